"""What each parameter of a model is for, by the module that holds it."""

from collections.abc import Iterator
from typing import Literal

from torch import nn

from moebius.experts.interface import Experts
from moebius.layers.attention import GroupedQueryAttentionLayer
from moebius.layers.latent_attention import LatentAttentionLayer
from moebius.layers.mlp import Mlp
from moebius.layers.moe import SparseMoeBlock
from moebius.layers.norm import RmsNormLayer
from moebius.layers.router import Router

Role = Literal["embedding", "attention", "norm", "router", "routed_experts", "shared_experts", "dense_mlp", "head"]


def parameter_roles(model: nn.Module) -> dict[str, Role]:
    """Name -> role, in the order of `named_parameters`."""
    roles = dict(_roles(model, "", "head"))
    return {name: roles[name] for name, _ in model.named_parameters()}


def _roles(module: nn.Module, prefix: str, inherited: Role) -> Iterator[tuple[str, Role]]:
    role = _own_role(module, inherited)
    for name, _ in module.named_parameters(recurse=False):
        yield prefix + name, role
    for name, child in module.named_children():
        yield from _roles(child, f"{prefix}{name}.", role)


def _own_role(module: nn.Module, inherited: Role) -> Role:
    """A module's role, or the one that it inherits: a Linear in an attention layer is "attention"."""
    match module:
        case nn.Embedding():
            return "embedding"
        case RmsNormLayer():
            return "norm"
        case GroupedQueryAttentionLayer() | LatentAttentionLayer():
            return "attention"
        case Router():
            return "router"
        case Experts():
            return "routed_experts"
        case SparseMoeBlock():
            return "shared_experts"
        case Mlp() if inherited != "shared_experts":
            return "dense_mlp"
        case _:
            return inherited

"""FSDP2 around a decoder whose experts are spread over ranks: states of training, a shard a rank.

Everything but the experts is sharded over all ranks of a replica, experts over the ranks that hold the same ones; each
unit gathers its parameters for its forward and backward.  Gradients are summed, never averaged: the experts have seen
all tokens of their set, the rest its own rank's alone, and an average would weigh them differently.
"""

from collections.abc import Iterable, Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from moebius.distributed.ranks import Ranks
from moebius.errors import ArgumentError, Fault
from moebius.experts.interface import Experts
from moebius.layers.decoder import Decoder


def shard(decoder: Decoder, ranks: Ranks) -> None:
    """Wraps the decoder, which is on the meta device or whole, in FSDP2 as ranks.grid says.

    ArgumentError: weights in quantized forms, which have no gradient.
    """
    _refuse_quantized(decoder)
    grid, kind = ranks.grid, ranks.device.type
    dense = init_device_mesh(kind, (grid.replicate, grid.fsdp), mesh_dim_names=("replicate", "fsdp"))
    layers = [module for module in decoder.modules() if isinstance(module, Experts)]
    whole = {parameter for experts in layers for parameter in experts.parameters()} if grid.efsdp == 1 else set()
    if grid.efsdp > 1:
        for experts in layers:
            _shard(experts, _of_one(ranks.mesh["replicate", "efsdp"], grid.replicate, "efsdp"), set())
    mesh = _of_one(dense, grid.replicate, "fsdp")
    for layer in cast(Iterable[nn.Module], decoder.model.layers):
        _shard(layer, mesh, whole)
    _shard(decoder, mesh, whole)


def fill(decoder: Decoder, tensors: Mapping[str, Tensor]) -> None:
    """Gives a decoder on the meta device its weights; of what is sharded, `tensors` has this rank's rows."""
    held = dict(decoder.named_parameters())
    state = {name: _placed(held.get(name), tensor) for name, tensor in tensors.items()}
    decoder.load_state_dict(state, assign=True, strict=False)


def _placed(parameter: nn.Parameter | None, tensor: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor):
        return tensor
    found = DTensor.from_local(
        tensor,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
    return nn.Parameter(found, requires_grad=parameter.requires_grad)


def _shard(module: nn.Module, mesh: DeviceMesh, ignored: set[nn.Parameter]) -> None:
    if all(parameter in ignored for parameter in module.parameters()):
        return
    fully_shard(module, mesh=mesh, ignored_params=ignored)
    unit = cast(FSDPModule, module)
    unit.set_gradient_divide_factor(1.0)
    unit.set_force_sum_reduction_for_comms(True)  # a factor alone becomes PREMUL_SUM, which bfloat16 does not survive


def _of_one(mesh: DeviceMesh, replicate: int, axis: str) -> DeviceMesh:
    """Without the axis of replicas, where there is one."""
    return mesh if replicate > 1 else mesh[axis]


def _refuse_quantized(decoder: Decoder) -> None:
    fixed = [name for name, each in decoder.named_parameters() if not torch.is_floating_point(each)]
    if fixed:
        raise ArgumentError(
            "fsdp_size above 1 is for training, and quantized weights are not trained",
            faults=[Fault(name, "quantized") for name in fixed],
            advice='load with dtype="bfloat16", or leave fsdp_size out',
        )

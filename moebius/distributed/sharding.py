"""FSDP2 around a decoder whose experts are spread over ranks: states of training, a shard a rank.

Everything but the experts is sharded over all ranks of a replica, experts over the ranks that hold the same ones; each
unit gathers its parameters for its forward and backward.  Gradients are summed, never averaged: the experts have seen
all tokens of their set, the rest its own rank's alone, and an average would weigh them differently.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import cast

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from moebius.distributed.ranks import Ranks
from moebius.errors import ArgumentError, Fault
from moebius.experts.contract import SEGMENTS
from moebius.experts.interface import Experts
from moebius.layers.decoder import Decoder
from moebius.layers.quantized import QuantizedLinear
from moebius.quantization.forms import Form


def shard(decoder: Decoder, ranks: Ranks) -> None:
    """Wraps the decoder, which is on the meta device or whole, in FSDP2 as ranks.grid says.

    ArgumentError: weights in quantized forms, which have no gradient.
    """
    _refuse_quantized(decoder)
    grid = ranks.grid
    dense = ranks.axes(replicate=grid.replicate, fsdp=grid.fsdp)
    mesh = _of_one(dense, grid.replicate, "fsdp")
    copies = _of_one(ranks.mesh["replicate", "efsdp"], grid.replicate, "efsdp")
    layers = [module for module in decoder.modules() if isinstance(module, Experts)]
    plain = {each for experts in layers if _stays_plain(experts, ranks) for each in experts.parameters()}
    for experts in layers:
        _shard(experts, copies, plain)
    for module in _of_other_dtypes(decoder):
        _shard(module, mesh, plain)
    for layer in cast(Iterable[nn.Module], decoder.model.layers):
        _shard(layer, mesh, plain)
    _shard(decoder, mesh, plain)


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


def _stays_plain(experts: Experts, ranks: Ranks) -> bool:
    """Nobody to share these experts with, or none of them here, nor on any rank of this set: FSDP2 cannot shard what is
    empty.
    """
    return ranks.grid.efsdp == 1 or experts.num_experts == 0


def _of_other_dtypes(decoder: Decoder) -> list[nn.Module]:
    """Modules with parameters of another dtype than the decoder's, as a router that is float32 in a bfloat16 layer: a
    unit of FSDP2 is of one dtype.  Experts are a unit by themselves anyway.
    """
    dtype = decoder.model.embed_tokens.weight.dtype
    return [
        module
        for module in decoder.modules()
        if not isinstance(module, Experts) and any(each.dtype != dtype for each in module.parameters(recurse=False))
    ]


def _shard(module: nn.Module, mesh: DeviceMesh, plain: set[nn.Parameter]) -> None:
    if all(parameter in plain for parameter in module.parameters()):
        return
    fully_shard(module, mesh=mesh, ignored_params=plain)
    unit = cast(FSDPModule, module)
    unit.set_gradient_divide_factor(1.0)
    unit.set_force_sum_reduction_for_comms(True)  # a factor alone becomes PREMUL_SUM, which bfloat16 does not survive


def _of_one(mesh: DeviceMesh, replicate: int, axis: str) -> DeviceMesh:
    """Without the axis of replicas, where there is one."""
    return mesh if replicate > 1 else mesh[axis]


def _refuse_quantized(decoder: Decoder) -> None:
    if faults := [Fault(name, "quantized", form.name) for name, form in _held(decoder)]:
        raise ArgumentError(
            "fsdp_size above 1 is for training, and quantized weights are not trained",
            faults=faults,
            advice='load with dtype="bfloat16" and without quantization, or leave fsdp_size out',
        )


def _held(decoder: Decoder) -> Iterator[tuple[str, Form]]:
    """Weights in quantized forms: not by their dtypes, for fp8 is a float to torch."""
    for path, module in decoder.named_modules():
        match module:
            case QuantizedLinear():
                yield f"{path}.weight", module.form
            case Experts():
                forms = {name: module.form_of(name) for name in SEGMENTS}
                yield from ((f"{path}.{name}", form) for name, form in forms.items() if form)

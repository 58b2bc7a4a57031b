"""How a decoder lies on ranks: read off its modules and parameters, so that nothing else has to remember it."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor
from torch.distributed.tensor import DTensor

from moebius.distributed.config import Batch
from moebius.distributed.expert_parallel import ParallelExperts
from moebius.distributed.ranks import Ranks
from moebius.layers.decoder import Decoder


class Spread(NamedTuple):
    """boxes: of parameters and buffers, the rows (axis 0) held, where these are not all.  shapes: of all, whole.

    A tied one is there under its first name.
    """

    ranks: Ranks
    batch: Batch
    boxes: Mapping[str, range]
    shapes: Mapping[str, tuple[int, ...]]

    def local(self, tensor: Tensor) -> Tensor:
        """What this rank holds of one of them."""
        return local(tensor)


def spread_of(decoder: Decoder) -> Spread | None:
    """None for a decoder that is this process's alone."""
    layers = {name: each for name, each in decoder.named_modules() if isinstance(each, ParallelExperts)}
    if not layers:
        return None
    experts = {
        f"{name}.{own}": each for name, each in layers.items() for own, _ in each.named_parameters(recurse=False)
    }
    boxes, shapes = dict[str, range](), dict[str, tuple[int, ...]]()
    named = decoder.state_dict(keep_vars=True)  # what FSDP2 has gathered it lets go for this
    first_names = {id(tensor): name for name, tensor in reversed(named.items())}
    for name, tensor in named.items():
        if first_names[id(tensor)] != name:
            continue
        held = experts[name].held if name in experts else range(tensor.shape[0] if tensor.ndim else 0)
        total = experts[name].layout.num_experts if name in experts else len(held)
        shapes[name] = (total, *tensor.shape[1:]) if tensor.ndim else ()
        mine = _rows_of(tensor, held) if isinstance(tensor, DTensor) else held
        boxes |= {name: mine} if len(mine) != total else {}
    first = next(iter(layers.values()))
    return Spread(first.ranks, first.batch, boxes, shapes)


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _rows_of(tensor: DTensor, held: range) -> range:
    """Of the rows `held` by its set of ranks, those of this one: FSDP2 cuts axis 0 as torch.chunk does."""
    mesh = tensor.device_mesh
    place, ranks = mesh.get_local_rank(mesh.ndim - 1), mesh.size(mesh.ndim - 1)
    each = -(-len(held) // ranks)
    return held[place * each : (place + 1) * each]

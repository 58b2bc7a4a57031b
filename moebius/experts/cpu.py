"""Inference on CPUs: rows sorted once, and each expert's weight read in the layout that the CPU's products like best.

A product that finds a plain weight rearranges it each time, which for few rows costs as much as the product.  So the
rearranged weights are kept: a copy of each expert, made when its first row comes.

T tokens, K experts a token, E experts, H hidden, S = T*K rows, M some of them.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from moebius.errors import BackendError, Fault
from moebius.experts import cpu_operators
from moebius.experts.activations import gated_activation
from moebius.experts.contract import ExpertWeights, owned_slots, weighted_sum
from moebius.experts.cpu_packing import PackedCopies
from moebius.experts.cpu_products import Projection, Workspace, product, projections

CPU_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
GROUP_ROWS = 512  # of 1536 numbers in bfloat16: 1.5 MB


def cpu_obstacles(device_type: str, dtype: torch.dtype, needs_grad: bool = False) -> list[str]:
    """Every reason why `cpu_experts` cannot run on weights of this dtype (where none is plain: on such states)."""
    return [
        *([f"device {device_type} (it runs on cpu)"] if device_type != "cpu" else []),
        *_dtype_obstacles(dtype),
        *(["gradients (it has no backward: call it under torch.no_grad())"] if needs_grad else []),
    ]


def _dtype_obstacles(dtype: torch.dtype) -> list[str]:
    if dtype not in CPU_DTYPES:
        return [f"dtype {dtype} (it takes {', '.join(map(str, CPU_DTYPES))})"]
    obstacle = cpu_operators.packed_linear_obstacle(dtype)
    return [f"{dtype} with packed weights on this machine: {obstacle}"] if obstacle else []


_Copies = tuple[PackedCopies[Any], PackedCopies[Any]]
"""Of gate_up_proj and of down_proj."""


class CpuExperts:
    """A backend, see `contract.ExpertsFunction`; reads the ids on the host.  Forward only.

    Keeps copies of the plain and of the 4-bit weights of each layer that it runs, about as large as these weights,
    until the layer is gone or `release`d.  The layers' own parameters stay as they are.  Layers are known by identity,
    and held weakly.

    Weights that were written to, moved or replaced are packed anew.  Writes through `.data` are seen by a sample of
    each expert: `release` the layer after one that leaves most of an expert as it was.
    """

    def __init__(self) -> None:
        self._layers: WeakKeyDictionary[ExpertWeights, _Copies] = WeakKeyDictionary()

    def __call__(
        self, experts: ExpertWeights, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        """BackendError: a gradient is asked for, or `cpu_obstacles` has another reason."""
        _refuse_obstacles(experts, hidden_states, top_k_weights)
        order = _sorted_on_host(top_k_index, experts.num_experts)
        with torch.no_grad():
            layer = _Layer(experts, self._copies(experts), list(order.counts), hidden_states.dtype)
            rows = _by_expert(layer, order, hidden_states, top_k_index.shape[1])
            slots = rows.index_select(0, order.inverse).unflatten(0, top_k_index.shape)
            weights = top_k_weights.where(owned_slots(experts, top_k_index), 0) if order.foreign else top_k_weights
            return weighted_sum(slots, weights, hidden_states.dtype)

    def release(self, experts: ExpertWeights) -> None:
        """Drop the copies of this layer's weights; its next call makes them anew."""
        self._layers.pop(experts, None)

    def __len__(self) -> int:
        """How many layers have copies."""
        return len(self._layers)

    def _copies(self, experts: ExpertWeights) -> _Copies:
        return self._layers.setdefault(experts, (PackedCopies(), PackedCopies()))


cpu_experts = CpuExperts()


class _HostOrder(NamedTuple):
    """Slots sorted by expert, ties in slot order; foreign ones last.

    order [S]: the slot at each sorted place.  inverse [S]: the sorted place of each slot.  counts: rows of each expert
    that has some, by id, in order.  foreign: slots of no expert.
    """

    order: Tensor
    inverse: Tensor
    counts: dict[int, int]
    foreign: int

    def groups(self) -> Iterator[dict[int, int]]:
        """`counts` in pieces of so few rows that what stands between two products stays in the CPU's cache."""
        group: dict[int, int] = {}
        for expert, count in self.counts.items():
            if group and sum(group.values()) + count > GROUP_ROWS:
                yield group
                group = {}
            group[expert] = count
        if group:
            yield group


def _sorted_on_host(top_k_index: Tensor, num_experts: int) -> _HostOrder:
    """In Python: for the few slots of a decoding step that is much faster than a dozen small tensor operations, and for
    many slots it does not show beside the products.
    """
    ids = [expert if 0 <= expert < num_experts else num_experts for expert in top_k_index.flatten().tolist()]
    order = sorted(range(len(ids)), key=ids.__getitem__)
    inverse = sorted(range(len(ids)), key=order.__getitem__)
    counts = dict(sorted(Counter(ids).items()))
    foreign = counts.pop(num_experts, 0)
    return _HostOrder(_int64(order), _int64(inverse), counts, foreign)


def _int64(numbers: list[int]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64)


class _Layer:
    """A layer's experts during one call."""

    def __init__(self, experts: ExpertWeights, copies: _Copies, hit: list[int], states: torch.dtype) -> None:
        self._activation, self._workspace = experts.activation, Workspace(states)
        self._gate_up, self._down = zip(projections(experts), copies, strict=True)
        for projection, own_copies in (self._gate_up, self._down):
            own_copies.follow(projection.sources, _int64(hit))

    def of(self, counts: dict[int, int], rows: Tensor) -> Tensor:
        """rows [M, H] in the experts' order, so many of each -> [M, H], in their dtype or in float32."""
        gate, up = self._times(self._gate_up, counts, rows).chunk(2, dim=-1)
        return self._times(self._down, counts, gated_activation(self._activation, gate, up))

    def _times(self, packed: tuple[Projection, PackedCopies[Any]], counts: dict[int, int], rows: Tensor) -> Tensor:
        projection, copies = packed
        parts = zip(counts, rows.split(list(counts.values())), strict=True)
        return torch.cat([product(projection, expert, part, copies, self._workspace) for expert, part in parts])


def _by_expert(layer: _Layer, order: _HostOrder, hidden_states: Tensor, top_k: int) -> Tensor:
    """hidden_states [T, H] -> what the experts make of them, [S, H] in the experts' order; zeros in foreign rows."""
    tokens = order.order // top_k
    outputs = hidden_states.new_empty(len(tokens), hidden_states.shape[1])
    start = 0
    for counts in order.groups():
        end = start + sum(counts.values())
        outputs[start:end] = layer.of(counts, hidden_states.index_select(0, tokens[start:end]))
        start = end
    outputs[start:] = 0
    return outputs


def _refuse_obstacles(experts: ExpertWeights, hidden_states: Tensor, top_k_weights: Tensor) -> None:
    biases = experts.gate_up_proj_bias, experts.down_proj_bias
    leaves = (hidden_states, top_k_weights, experts.gate_up_proj, experts.down_proj, *biases)
    needs_grad = torch.is_grad_enabled() and any(leaf is not None and leaf.requires_grad for leaf in leaves)
    obstacles = cpu_obstacles(hidden_states.device.type, hidden_states.dtype, needs_grad)
    if obstacles:
        raise BackendError(
            'experts_implementation="cpu" cannot run here',
            faults=[Fault("cpu", "cannot run", obstacle) for obstacle in obstacles],
            advice='run it under torch.no_grad(), or take "auto"' if needs_grad else 'take "auto"',
        )

"""The path for a handful of tokens: two launches, nothing sorted; each slot's products are read off its own expert.

Reading weights by slot is right while few slots share an expert; see `decode_serves`.  Weights may be plain or in any
quantized form, which is decoded in registers.

T tokens, K experts a token, E experts, H hidden, I intermediate, S = T*K slots.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from moebius.experts.contract import ExpertWeights
from moebius.experts.fused.decode_kernels import decode_down_kernel, decode_gate_up_kernel
from moebius.experts.fused.operands import activation_kind, activation_numbers, can_overlap
from moebius.experts.fused.quantized_matrices import Matrices

PAIRS_PER_EXPERT = 1.25


@dataclass(frozen=True)
class DecodeTiles:
    """Of one launch: columns a program gives, inputs a block, warps, loads in flight through shared memory (1: none),
    whether the second launch may start before the first has ended (sm_90 on), and whether integers of 4 and 8 bits go
    through matrix instructions, where `Matrices.dotted` has them: then one warp, and
    blocks of at most 512 (int8), 1024 (int4), or of 256 (int4 in groups of less than 128).
    """

    block_n: int
    block_k: int
    num_warps: int
    stages: int = 1
    overlap: bool = True
    dot: bool = False


# measured on an H200 with 128 experts of 3 x 768 x 2048, at 1..8 tokens.  The second launch waits early only where it
# is no slower for it: programs of one warp that wait crowd on the processors that had room first.
GATE_UP_TILES = {
    "plain": DecodeTiles(2, 256, 1),
    "int8_row": DecodeTiles(2, 512, 1, overlap=False),
    "fp8_block": DecodeTiles(4, 1024, 2),
    "int4_pack": DecodeTiles(4, 2048, 2, overlap=False),
    "mxfp4": DecodeTiles(4, 1024, 1, 3, overlap=False),
}
DOWN_TILES = {
    "plain": DecodeTiles(4, 1024, 4),
    "int8_row": DecodeTiles(4, 512, 1, 3, overlap=False),
    "fp8_block": DecodeTiles(4, 1024, 2),
    "int4_pack": DecodeTiles(4, 1024, 1, 3, overlap=False),
    "mxfp4": DecodeTiles(4, 1024, 1, 3, overlap=False),
}
# Measured on an H200 at 8 tokens, microseconds of both launches: int8 84.8 -> 75.1, int4 72.0 -> 60.7; at 4 tokens the
# tiles above are ahead.
FEW_TOKENS = 4
MANY_GATE_UP_TILES = {
    "int8_row": DecodeTiles(2, 512, 1, overlap=False, dot=True),
    "int4_pack": DecodeTiles(8, 256, 1, overlap=False, dot=True),
}
MANY_DOWN_TILES = {
    "int8_row": DecodeTiles(8, 256, 1, overlap=False, dot=True),
    "int4_pack": DecodeTiles(8, 256, 1, overlap=False, dot=True),
}


def shipped_tiles(projection: str, form: str, tokens: int) -> DecodeTiles:
    """form: a Matrices' name."""
    few, many = (GATE_UP_TILES, MANY_GATE_UP_TILES) if projection == "gate_up_proj" else (DOWN_TILES, MANY_DOWN_TILES)
    return many.get(form, few[form]) if tokens > FEW_TOKENS else few[form]


def decode_serves(num_experts: int, tokens: int, top_k: int) -> bool:
    """Whether so few slots share an expert, if routing is uniform, that reading weights by slot is right.

    num_experts: all that the router chooses from; what holds for all of them holds for a share.

    E (1 - (1 - K/E)^T) experts are hit; at most 1.25 slots for each.
    """
    hit = num_experts * (1 - (1 - top_k / num_experts) ** tokens)
    return 0 < tokens * top_k <= PAIRS_PER_EXPERT * hit


def decode_experts(experts: ExpertWeights, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """See `contract.ExpertsFunction`; no gradients.  Products and sums in float32; gate and up are rounded once, after
    the activation.  BackendError: weights that are not contiguous, or a form's groups that the kernels do not take.
    """
    hidden_states, ids, weights = hidden_states.contiguous(), top_k_index.contiguous(), top_k_weights.contiguous()
    if ids.numel() == 0:
        return torch.zeros_like(hidden_states)
    with torch.cuda.device_of(hidden_states):
        rows = decode_gate_up(experts, hidden_states, ids)
        return decode_down(experts, rows, ids, weights)


def decode_gate_up(
    experts: ExpertWeights, hidden_states: Tensor, top_k_index: Tensor, tiles: DecodeTiles | None = None
) -> Tensor:
    """hidden_states [T, H], contiguous, top_k_index [T, K] -> activations [S, I], foreign slots' rows not written."""
    matrices = Matrices.of("gate_up_proj", experts.gate_up_proj, experts.gate_up_proj_form, experts.gate_up_proj_scale)
    tiles = tiles or shipped_tiles("gate_up_proj", matrices.name, len(hidden_states))
    matrices = (tiles.dot and matrices.dotted(hidden_states.dtype)) or matrices
    intermediate = matrices.out_features // 2
    out = hidden_states.new_empty(top_k_index.numel(), intermediate)
    decode_gate_up_kernel[(len(out), triton.cdiv(intermediate, tiles.block_n))](
        hidden_states,
        top_k_index,
        matrices.values,
        matrices.scales,
        experts.gate_up_proj_bias,
        out,
        matrices.number,
        *activation_numbers(experts.activation),
        HIDDEN=matrices.in_features,
        INTERMEDIATE=intermediate,
        ACTIVATION=activation_kind(experts.activation),
        HAS_BIAS=experts.gate_up_proj_bias is not None,
        **_constants(experts, top_k_index, matrices, tiles, hidden_states.device),
    )
    return out


def decode_down(
    experts: ExpertWeights,
    rows: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    tiles: DecodeTiles | None = None,
) -> Tensor:
    """rows [S, I] through down_proj, each token's weighted and added up: [T, H]."""
    matrices = Matrices.of("down_proj", experts.down_proj, experts.down_proj_form, experts.down_proj_scale)
    tiles = tiles or shipped_tiles("down_proj", matrices.name, len(top_k_index))
    matrices = (tiles.dot and matrices.dotted(rows.dtype)) or matrices
    out = rows.new_empty(len(top_k_index), matrices.out_features)
    constants = _constants(experts, top_k_index, matrices, tiles, rows.device)
    decode_down_kernel[(len(out), triton.cdiv(matrices.out_features, tiles.block_n))](
        rows,
        top_k_index,
        top_k_weights,
        matrices.values,
        matrices.scales,
        experts.down_proj_bias,
        out,
        matrices.number,
        HIDDEN=matrices.out_features,
        INTERMEDIATE=matrices.in_features,
        HAS_BIAS=experts.down_proj_bias is not None,
        launch_pdl=constants["PDL"],
        **constants,
    )
    return out


def _constants(
    experts: ExpertWeights, top_k_index: Tensor, matrices: Matrices, tiles: DecodeTiles, device: torch.device
) -> dict[str, int]:
    """What both kernels take by the same names."""
    return {
        "NUM_EXPERTS": experts.num_experts,
        "TOP_K": top_k_index.shape[1],
        **matrices.constants,
        "DOT": matrices.dots,
        "BN": tiles.block_n,
        "BK": tiles.block_k,
        "STAGES": tiles.stages,
        "PDL": tiles.overlap and can_overlap(device),
        "num_warps": tiles.num_warps,
    }

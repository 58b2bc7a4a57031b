"""The products over sorted rows with weights in a quantized form, which is decoded in the kernels; and, for training
what stands before quantized experts, their products backwards.

T tokens, K experts a token, E experts, H hidden, I intermediate, S = T*K rows.
"""

import torch
import triton
from torch import Tensor

from moebius.config import Activation
from moebius.experts.contract import SEGMENTS
from moebius.experts.fused.operands import activation_kind, activation_numbers, blocks, overlapping
from moebius.experts.fused.quantized_kernels import (
    decode_matrices_kernel,
    quantized_down_kernel,
    quantized_gate_up_kernel,
    quantized_input_kernel,
)
from moebius.experts.fused.quantized_matrices import TWO_TO_23, Matrices
from moebius.experts.fused.routing import Routing, tiled
from moebius.experts.fused.tuning import ForwardTiles, TileConfig
from moebius.quantization.forms import Form

INPUT_TILES = TileConfig(64, 128, 64, 8, 3)
"""Of the products backwards, whatever the rows."""
DECODED_ROWS, DECODED_BYTES = 256, 4 << 30
DECODED_BLOCK = (16, 256)


def quantized_tiles(rows_per_expert: float) -> ForwardTiles:
    """Blocks by the rows that an expert has on average; weights are the tall side, so 16 rows fill an instruction."""
    block_m = next((rows for rows in (16, 32, 64) if rows_per_expert <= rows), 128)
    if block_m <= 32:
        return ForwardTiles(TileConfig(block_m, 32, 128, 4, 3), TileConfig(block_m, 64, 128, 4, 3))
    return ForwardTiles(TileConfig(block_m, 64, 128, 8, 3), TileConfig(block_m, 128, 128, 8, 3))


def quantized_gate_up(
    x: Tensor,
    gate_up_proj: Tensor,
    form: Form,
    scales: Tensor,
    bias: Tensor | None,
    routing: Routing,
    config: TileConfig,
    activation: Activation,
    save_z: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """As `forward.gate_up`, with gate_up_proj and its scales as the form lays them out.

    config: block_n a multiple of 8; block_k of the form's runs.  BackendError: as `Matrices.of`.
    """
    matrices = Matrices.of("gate_up_proj", gate_up_proj, form, scales)
    width = matrices.out_features // 2
    a = x.new_empty(routing.rows, width)
    z = x.new_empty(routing.rows, 2 * width) if save_z else None
    quantized_gate_up_kernel[(routing.max_tiles * triton.cdiv(width, config.block_n),)](
        x, matrices.values, matrices.scales, bias, a, z, routing.order, *routing.tiles, TWO_TO_23,
        *activation_numbers(activation), H=matrices.in_features, I=width, TOP_K=routing.top_k,
        ACTIVATION=activation_kind(activation), HAS_BIAS=bias is not None, SAVE_Z=save_z,
        **matrices.constants, **blocks(config), **overlapping(x.device, routing),
    )  # fmt: skip
    return a, z


def quantized_down(
    a: Tensor, down_proj: Tensor, form: Form, scales: Tensor, bias: Tensor | None, routing: Routing, config: TileConfig
) -> Tensor:
    """As `forward.down`, with down_proj and its scales as the form lays them out."""
    matrices = Matrices.of("down_proj", down_proj, form, scales)
    y = a.new_empty(routing.rows, matrices.out_features)
    quantized_down_kernel[(routing.max_tiles * triton.cdiv(matrices.out_features, config.block_n),)](
        a, matrices.values, matrices.scales, bias, y, *routing.tiles, TWO_TO_23, H=matrices.out_features,
        I=matrices.in_features, HAS_BIAS=bias is not None, **matrices.constants, **blocks(config),
        **overlapping(a.device, routing),
    )  # fmt: skip
    return y


def quantized_input_gradient(
    rows: Tensor, projection: str, values: Tensor, form: Form, scales: Tensor, offsets: Tensor
) -> Tensor:
    """rows [S, out] in the sorted order times their expert's matrix [out, in]: [S, in].

    projection: "gate_up_proj" or "down_proj".  offsets [E+1]: a Routing's.  Foreign rows give zeros.  S > 0.
    """
    matrices = Matrices.of(projection, values, form, scales)
    places = offsets.new_empty(len(rows))  # of which tiles need but the number
    routing = tiled(places, places, offsets, 1, INPUT_TILES.block_m)
    out = rows.new_zeros(len(rows), matrices.in_features)
    quantized_input_kernel[(routing.max_tiles * triton.cdiv(matrices.in_features, INPUT_TILES.block_n),)](
        rows, matrices.values, matrices.scales, out, *routing.tiles, TWO_TO_23, N=matrices.out_features,
        C=matrices.in_features, SEGMENT=matrices.out_features // SEGMENTS[projection], **matrices.constants,
        **blocks(INPUT_TILES), **overlapping(rows.device, routing),
    )  # fmt: skip
    return out


def decodes_first(rows_per_expert: float, num_weights: int, dtype: torch.dtype) -> bool:
    """Whether a projection is better decoded once, for the products of plain weights: at so many rows that decoding it
    for every tile costs more, if it is small enough to stand decoded for a while.
    """
    return rows_per_expert > DECODED_ROWS and num_weights * dtype.itemsize <= DECODED_BYTES


def decoded(projection: str, values: Tensor, form: Form, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """[E, out, in] in dtype: what `quantization.dequantize` gives, in one pass without float32 copies."""
    matrices = Matrices.of(projection, values, form, scales)
    shape = len(values), matrices.out_features, matrices.in_features
    out = torch.empty(shape, dtype=dtype, device=values.device)
    grid = shape[0], triton.cdiv(shape[1], DECODED_BLOCK[0]), triton.cdiv(shape[2], DECODED_BLOCK[1])
    decode_matrices_kernel[grid](
        matrices.values, matrices.scales, out, TWO_TO_23, N=shape[1], C=shape[2],
        SEGMENT=shape[1] // SEGMENTS[projection], BLOCK_N=DECODED_BLOCK[0], BLOCK_K=DECODED_BLOCK[1],
        **matrices.constants,
    )  # fmt: skip
    return out

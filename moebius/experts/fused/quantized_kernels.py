"""Products over tiles of one expert's rows with weights in a quantized form, decoded on their way into tl.dot.

The weights are the tall side of the product, which a matrix instruction can take from registers: [2 BN, BK] of gate
and up, or [BN, BK] of down, times BM rows.  What is decoded is what `quantization.dequantize` gives in the rows' dtype,
except that a scale of a whole row is multiplied in at the end.

T tokens, K experts a token, E experts, H hidden, I intermediate, S = T*K rows, R rows of weights, BK inputs of a block.
"""
# ruff: noqa: E741  (I is the intermediate size)

import triton.language as tl

from moebius.experts.fused.forward_kernels import activated, await_previous, located, store_tile, with_bias
from moebius.experts.fused.jit import jit
from moebius.experts.fused.quantized_values import (
    INT4,
    INT8,
    int4_numbers,
    int8_numbers,
    mxfp4_numbers,
    run_scales,
)


@jit
def decoded_tile(
    values, scales, rows, scale_rows, keep, k, two_to_23, C: tl.constexpr, KIND: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr, RUN: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """[R, BK] float32, zeros outside; without its scale where a row shares one."""
    R: tl.constexpr = rows.shape[0]
    if KIND >= INT4:
        words = k // 8 + tl.arange(0, BLOCK_K // 8)
        mask = keep[:, None] & (words < C // 8)[None, :]
        codes = tl.load(values + rows[:, None] * (C // 8) + words[None, :], mask=mask, other=0)
        codes = codes.to(tl.uint32, bitcast=True)
        numbers = int4_numbers(codes, two_to_23) if KIND == INT4 else mxfp4_numbers(codes)
    else:
        columns = k + tl.arange(0, BLOCK_K)
        mask = keep[:, None] & (columns < C)[None, :]
        loaded = tl.load(values + rows[:, None] * C + columns[None, :], mask=mask, other=0.0)
        numbers = int8_numbers(loaded) if KIND == INT8 else loaded.to(tl.float32)
    if SCALE_COLUMNS < C:
        of_runs = run_scales(scales, scale_rows, keep, k, C, SCALE_COLUMNS, RUN, BLOCK_K)
        numbers = tl.reshape(tl.reshape(numbers, (R, BLOCK_K // RUN, RUN)) * of_runs[:, :, None], (R, BLOCK_K))
    return numbers


@jit
def decoded_product(
    x, addresses, mine, values, scales, rows, scale_rows, keep, two_to_23, C: tl.constexpr, KIND: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr, RUN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows of weights [R, C] times rows of x at addresses, where they are mine: [R, BLOCK_M] float32."""
    acc = tl.zeros((rows.shape[0], BLOCK_M), tl.float32)
    for k in range(0, C, BLOCK_K):
        weights = decoded_tile(
            values, scales, rows, scale_rows, keep, k, two_to_23, C, KIND, SCALE_COLUMNS, RUN, BLOCK_K
        )  # fmt: skip
        c = k + tl.arange(0, BLOCK_K)[None, :]
        inputs = tl.load(addresses[:, None] + c, mask=mine[:, None] & (c < C), other=0)
        acc = tl.dot(weights.to(x.dtype.element_ty), inputs.T, acc, input_precision="ieee")
    if SCALE_COLUMNS >= C:
        acc *= run_scales(scales, scale_rows, keep, 0, C, SCALE_COLUMNS, RUN, BLOCK_K)
    return acc


@jit
def quantized_gate_up_kernel(
    x, values, scales, bias, a, z, order, offsets, tile_expert, tile_row, num_tiles, two_to_23, alpha, limit,
    H: tl.constexpr, I: tl.constexpr, TOP_K: tl.constexpr, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr,
    SAVE_Z: tl.constexpr, VALUES: tl.constexpr, SCALES: tl.constexpr, KIND: tl.constexpr, SCALE_ROWS: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr, RUN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """As `forward_kernels.gate_up_kernel`, of weights in a form.

    Eight rows of gate and eight of up alternate, as a thread holds rows r and r + 8 of what a dot gives.
    """
    await_previous(OVERLAP)
    columns: tl.constexpr = (I + BLOCK_N - 1) // BLOCK_N
    if tl.program_id(0) >= tl.load(num_tiles) * columns:
        return
    expert, row, end, column = located(tl.program_id(0), tile_expert, tile_row, offsets, columns, BLOCK_M, GROUP_M)
    places = row + tl.arange(0, BLOCK_M)
    mine = places < end
    addresses = x + (tl.load(order + places, mask=mine, other=0) // TOP_K).to(tl.int64) * H
    r = tl.arange(0, 2 * BLOCK_N)
    half, outs = r // 8 % 2, column * BLOCK_N + r // 16 * 8 + r % 8
    scale_rows = half * ((I + SCALE_ROWS - 1) // SCALE_ROWS) + outs // SCALE_ROWS
    expert = expert.to(tl.int64)
    acc = decoded_product(
        x, addresses, mine, values + expert * VALUES, scales + expert * SCALES, half * I + outs, scale_rows, outs < I,
        two_to_23, H, KIND, SCALE_COLUMNS, RUN, BLOCK_M, BLOCK_K,
    )  # fmt: skip
    gate, up = acc.reshape(BLOCK_N // 8, 2, 8, BLOCK_M).permute(0, 2, 3, 1).split()
    gate, up = gate.reshape(BLOCK_N, BLOCK_M).T, up.reshape(BLOCK_N, BLOCK_M).T
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    gate = with_bias(gate, bias, expert, n, 0, I, 2, HAS_BIAS)
    up = with_bias(up, bias, expert, n, 1, I, 2, HAS_BIAS)
    if SAVE_Z:
        store_tile(z, row, mine, n, 0, gate, I, 2, BLOCK_M)
        store_tile(z, row, mine, n, 1, up, I, 2, BLOCK_M)
    store_tile(a, row, mine, n, 0, activated(gate, up, alpha, limit, ACTIVATION), I, 1, BLOCK_M)


@jit
def quantized_down_kernel(
    a, values, scales, bias, y, offsets, tile_expert, tile_row, num_tiles, two_to_23,
    H: tl.constexpr, I: tl.constexpr, HAS_BIAS: tl.constexpr, VALUES: tl.constexpr, SCALES: tl.constexpr,
    KIND: tl.constexpr, SCALE_ROWS: tl.constexpr, SCALE_COLUMNS: tl.constexpr, RUN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """As `forward_kernels.down_kernel`, of weights in a form, a program a work item."""
    await_previous(OVERLAP)
    columns: tl.constexpr = (H + BLOCK_N - 1) // BLOCK_N
    if tl.program_id(0) >= tl.load(num_tiles) * columns:
        return
    expert, row, end, column = located(tl.program_id(0), tile_expert, tile_row, offsets, columns, BLOCK_M, GROUP_M)
    places = row + tl.arange(0, BLOCK_M)
    mine = places < end
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    expert = expert.to(tl.int64)
    acc = decoded_product(
        a, a + places.to(tl.int64) * I, mine, values + expert * VALUES, scales + expert * SCALES, n, n // SCALE_ROWS,
        n < H, two_to_23, I, KIND, SCALE_COLUMNS, RUN, BLOCK_M, BLOCK_K,
    )  # fmt: skip
    store_tile(y, row, mine, n, 0, with_bias(acc.T, bias, expert, n, 0, H, 1, HAS_BIAS), H, 1, BLOCK_M)


@jit
def stacked_scale_rows(n, SEGMENT: tl.constexpr, SCALE_ROWS: tl.constexpr):
    """Rows of scales of rows n of stacked matrices: each begins with a block of its own."""
    return n // SEGMENT * ((SEGMENT + SCALE_ROWS - 1) // SCALE_ROWS) + n % SEGMENT // SCALE_ROWS


@jit
def quantized_input_kernel(
    rows, values, scales, out, offsets, tile_expert, tile_row, num_tiles, two_to_23,
    N: tl.constexpr, C: tl.constexpr, SEGMENT: tl.constexpr, VALUES: tl.constexpr, SCALES: tl.constexpr,
    KIND: tl.constexpr, SCALE_ROWS: tl.constexpr, SCALE_COLUMNS: tl.constexpr, RUN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """out [S, C] = rows [S, N] W, both in the sorted order; W [N, C] stacks matrices of SEGMENT rows."""
    await_previous(OVERLAP)
    columns: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    if tl.program_id(0) >= tl.load(num_tiles) * columns:
        return
    expert, row, end, column = located(tl.program_id(0), tile_expert, tile_row, offsets, columns, BLOCK_M, GROUP_M)
    places = row + tl.arange(0, BLOCK_M)
    mine = places < end
    expert = expert.to(tl.int64)
    values, scales, addresses = values + expert * VALUES, scales + expert * SCALES, rows + places.to(tl.int64) * N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, N, BLOCK_K):
        n = first + tl.arange(0, BLOCK_K)
        scale_rows = stacked_scale_rows(n, SEGMENT, SCALE_ROWS)
        weights = decoded_tile(
            values, scales, n, scale_rows, n < N, column * BLOCK_N, two_to_23, C, KIND, SCALE_COLUMNS, RUN, BLOCK_N
        )  # fmt: skip
        if SCALE_COLUMNS >= C:
            weights *= run_scales(scales, scale_rows, n < N, 0, C, SCALE_COLUMNS, RUN, BLOCK_N)
        inputs = tl.load(addresses[:, None] + n[None, :], mask=mine[:, None] & (n < N)[None, :], other=0)
        acc = tl.dot(inputs, weights.to(inputs.dtype), acc, input_precision="ieee")
    c = column * BLOCK_N + tl.arange(0, BLOCK_N)
    store_tile(out, row, mine, c, 0, acc, C, 1, BLOCK_M)


@jit
def decode_matrices_kernel(
    values, scales, out, two_to_23, N: tl.constexpr, C: tl.constexpr, SEGMENT: tl.constexpr, VALUES: tl.constexpr,
    SCALES: tl.constexpr, KIND: tl.constexpr, SCALE_ROWS: tl.constexpr, SCALE_COLUMNS: tl.constexpr, RUN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [E, N, C]: the matrices, SEGMENT rows stacked on others, decoded; a program per expert and block."""
    expert, k = tl.program_id(0).to(tl.int64), tl.program_id(2) * BLOCK_K
    values, scales = values + expert * VALUES, scales + expert * SCALES
    n, c = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N), k + tl.arange(0, BLOCK_K)
    scale_rows = stacked_scale_rows(n, SEGMENT, SCALE_ROWS)
    weights = decoded_tile(
        values, scales, n, scale_rows, n < N, k, two_to_23, C, KIND, SCALE_COLUMNS, RUN, BLOCK_K
    )  # fmt: skip
    if SCALE_COLUMNS >= C:
        weights *= run_scales(scales, scale_rows, n < N, 0, C, SCALE_COLUMNS, RUN, BLOCK_K)
    mask = (n < N)[:, None] & (c < C)[None, :]
    tl.store(out + expert * (N * C) + n[:, None] * C + c[None, :], weights.to(out.dtype.element_ty), mask=mask)

"""The two kernels of the path for a handful of tokens: rows of weights against one vector, in float32.

T tokens, K experts a token, E experts, H hidden, I intermediate, S = T*K slots, R rows of a program, BK inputs of a
block.  A run is what one thread loads at once, 16 bytes of values: its products are added first.  With DOT, integers of
4 and 8 bits go through matrix instructions; a run is what four threads load at once (`decode_dots`).
"""
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

import triton.language as tl

from moebius.experts.fused.decode_dots import RUN_COLUMNS, diagonal, dot_products, over_columns, quad_size
from moebius.experts.fused.forward_kernels import activated
from moebius.experts.fused.jit import jit
from moebius.experts.fused.quantized_values import (
    INT4,
    INT8,
    PLAIN,
    int4_products,
    int8_numbers,
    mxfp4_products,
    run_scales,
    word_planes,
)


@jit
def run_products(
    x_ptr, values_ptr, rows, keep, owned, k, two_to_23, WIDTH: tl.constexpr, KIND: tl.constexpr, RUN: tl.constexpr,
    BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x[k : k + BK] times the values' rows, in runs: [R, BK / RUN] float32.  What is not kept is not read.

    PDL: x comes from the launch before this one, which may still run: weights are asked for before it is waited for.
    """
    R: tl.constexpr = rows.shape[0]
    columns = k + tl.arange(0, BK)
    if KIND >= INT4:
        words = k // 8 + tl.arange(0, BK // 8)
        mask = keep[:, None] & (words < WIDTH // 8)[None, :]
        codes = tl.load(values_ptr + rows[:, None] * (WIDTH // 8) + words[None, :], mask=mask, other=0)
        codes = codes.to(tl.uint32, bitcast=True)
        if PDL:
            tl.extra.cuda.gdc_wait()
        x = tl.load(x_ptr + columns, mask=owned & (columns < WIDTH), other=0.0).to(tl.float32)
        x0, x1, x2, x3, x4, x5, x6, x7 = word_planes(x, BK // 8)
        planes = x0[None, :], x1[None, :], x2[None, :], x3[None, :], x4[None, :], x5[None, :], x6[None, :], x7[None, :]
        products = int4_products(codes, planes, two_to_23) if KIND == INT4 else mxfp4_products(codes, planes)
        products = tl.reshape(products, (R, BK // RUN, RUN // 8))
    else:
        mask = keep[:, None] & (columns < WIDTH)[None, :]
        values = tl.load(values_ptr + rows[:, None] * WIDTH + columns[None, :], mask=mask, other=0.0)
        if PDL:
            tl.extra.cuda.gdc_wait()
        x = tl.load(x_ptr + columns, mask=owned & (columns < WIDTH), other=0.0).to(tl.float32)
        numbers = int8_numbers(values) if KIND == INT8 else values.to(tl.float32)
        products = tl.reshape(numbers * x[None, :], (R, BK // RUN, RUN))
    return tl.sum(products, axis=2)


@jit
def block_products(
    x_ptr, values_ptr, scales_ptr, rows, scale_rows, keep, owned, k, number, WIDTH: tl.constexpr, KIND: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr, DOT: tl.constexpr, RUN: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x[k : k + BK] times rows of weights, not all added up: [R, COLUMNS] float32, for `added`.

    number: `Matrices.number`.
    """
    if DOT:
        products = dot_products(x_ptr, values_ptr, rows, keep, owned, k, number, WIDTH, KIND, RUN, BK, PDL)
    else:
        products = run_products(x_ptr, values_ptr, rows, keep, owned, k, number, WIDTH, KIND, RUN, BK, PDL)
    if KIND != PLAIN:
        scales = run_scales(scales_ptr, scale_rows, keep, k, WIDTH, SCALE_COLUMNS, RUN, BK)
        products *= over_columns(scales, KIND, RUN, BK) if DOT else scales
    return products


@jit
def no_products(ROWS: tl.constexpr, KIND: tl.constexpr, DOT: tl.constexpr, RUN: tl.constexpr, BK: tl.constexpr):
    """Zeros of what `block_products` gives."""
    COLUMNS: tl.constexpr = BK // quad_size(KIND) * RUN_COLUMNS if DOT else BK // RUN
    return tl.zeros((ROWS, COLUMNS), tl.float32)


@jit
def added(total, KIND: tl.constexpr, DOT: tl.constexpr, RUN: tl.constexpr):
    """[R, COLUMNS] -> [R]."""
    return tl.sum(diagonal(total, KIND, RUN) if DOT else total, axis=1)


@jit
def decode_gate_up_kernel(
    x_ptr,  # [T, H]
    ids_ptr,  # [S] int64
    values_ptr,  # gate_up_proj [E, 2I, H], or the values of its form
    scales_ptr,
    bias_ptr,  # [E, 2I]
    out_ptr,  # [S, I]; rows of foreign slots are not written
    number,  # see `block_products`; as a constant it would cost an instruction at every use
    alpha,
    limit,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    VALUES: tl.constexpr,  # elements of an expert's values
    SCALES: tl.constexpr,  # and of its scales
    KIND: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr,
    RUN: tl.constexpr,
    DOT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program per slot and BN columns of I; slots stand next to each other, so that slots of one expert, which read
    the same rows, run at the same time and meet in L2.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    slot, block = tl.program_id(0), tl.program_id(1)
    expert = tl.load(ids_ptr + slot)
    if (expert < 0) | (expert >= NUM_EXPERTS):
        return
    half, column = tl.arange(0, 2 * BN) // BN, block * BN + tl.arange(0, 2 * BN) % BN
    rows, keep = half * INTERMEDIATE + column, column < INTERMEDIATE
    scale_rows = half * ((INTERMEDIATE + SCALE_ROWS - 1) // SCALE_ROWS) + column // SCALE_ROWS
    x_ptr += (slot // TOP_K) * HIDDEN
    values_ptr += expert * VALUES
    if KIND != PLAIN:
        scales_ptr += expert * SCALES
    total = no_products(2 * BN, KIND, DOT, RUN, BK)
    for k in tl.range(0, HIDDEN, BK, num_stages=STAGES):
        total += block_products(
            x_ptr, values_ptr, scales_ptr, rows, scale_rows, keep, True, k, number, HIDDEN, KIND, SCALE_COLUMNS, DOT,
            RUN, BK, False,
        )  # fmt: skip
    gate_up = added(total, KIND, DOT, RUN)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + expert * (2 * INTERMEDIATE) + rows, mask=keep, other=0.0)
        gate_up += bias.to(tl.float32)
    gate, up = tl.split(tl.trans(tl.reshape(gate_up, (2, BN))))
    columns = block * BN + tl.arange(0, BN)
    out = activated(gate, up, alpha, limit, ACTIVATION).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + slot * INTERMEDIATE + columns, out, mask=columns < INTERMEDIATE)


@jit
def decode_down_kernel(
    x_ptr,  # [S, I]
    ids_ptr,  # [S] int64
    weights_ptr,  # [S]
    values_ptr,  # down_proj [E, H, I], or the values of its form
    scales_ptr,
    bias_ptr,  # [E, H]
    out_ptr,  # [T, H]
    number,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    VALUES: tl.constexpr,
    SCALES: tl.constexpr,
    KIND: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr,
    RUN: tl.constexpr,
    DOT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program per token and BN columns of H, over the token's slots in their order."""
    token, block = tl.program_id(0), tl.program_id(1)
    rows = block * BN + tl.arange(0, BN)
    inside = rows < HIDDEN
    BLOCKS: tl.constexpr = (INTERMEDIATE + BK - 1) // BK
    total = no_products(BN, KIND, DOT, RUN, BK)
    if PDL and STAGES > 1:  # loads in flight are asked for ahead of anything in the loop
        tl.extra.cuda.gdc_wait()
    for step in tl.range(0, TOP_K * BLOCKS, num_stages=STAGES):
        slot, k = token * TOP_K + step // BLOCKS, step % BLOCKS * BK
        expert = tl.load(ids_ptr + slot)
        owned = (expert >= 0) & (expert < NUM_EXPERTS)
        weight = tl.load(weights_ptr + slot, mask=owned, other=0.0).to(tl.float32)
        expert = tl.where(owned, expert, 0)
        scales = scales_ptr + expert * SCALES if KIND != PLAIN else scales_ptr
        total += weight * block_products(
            x_ptr + slot * INTERMEDIATE, values_ptr + expert * VALUES, scales, rows, rows // SCALE_ROWS, inside & owned,
            owned, k, number, INTERMEDIATE, KIND, SCALE_COLUMNS, DOT, RUN, BK, PDL and STAGES == 1,
        )  # fmt: skip
    out = added(total, KIND, DOT, RUN)
    if HAS_BIAS:
        for k in tl.range(0, TOP_K):
            slot = token * TOP_K + k
            expert = tl.load(ids_ptr + slot)
            owned = (expert >= 0) & (expert < NUM_EXPERTS)
            weight = tl.load(weights_ptr + slot, mask=owned, other=0.0).to(tl.float32)
            bias = tl.load(bias_ptr + tl.where(owned, expert, 0) * HIDDEN + rows, mask=inside & owned, other=0.0)
            out += weight * bias.to(tl.float32)
    tl.store(out_ptr + token * HIDDEN + rows, out.to(out_ptr.dtype.element_ty), mask=inside)

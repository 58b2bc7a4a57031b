"""The products of the forward pass, tile by tile of one expert's rows, and the weighted sum of a token's rows.

A work item is a tile of BLOCK_M sorted rows times BLOCK_N columns of its expert's weight.  Weights are [E, P, N, C]:
P = 2 for gate and up, side by side over the same rows, 1 for down; C is the contraction (H, then I).

T tokens, K experts a token, E experts, H hidden, I intermediate, S = T*K rows.
"""
# ruff: noqa: E741  (I is the intermediate size)

import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moebius.experts.fused.jit import jit

SWIGLU = tl.constexpr(0)  # the other activation is ClampedSwiGLU


@jit
def await_previous(OVERLAP: tl.constexpr):
    """With programmatic dependent launch: nothing is read before the kernel in front has ended, but this one stands
    ready, and lets the next one do so.  All kernels of a chain wait, so what ran before the one in front has ended too.
    """
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()


@jit
def activated(gate, up, alpha, limit, ACTIVATION: tl.constexpr):
    """The formulas of `config.SwiGLU` and `config.ClampedSwiGLU`, in float32."""
    if ACTIVATION == SWIGLU:
        value = gate * tl.sigmoid(gate) * up
    else:
        gate = tl.minimum(gate, limit)
        value = gate * tl.sigmoid(alpha * gate) * (tl.minimum(tl.maximum(up, -limit), limit) + 1)
    return value


@jit
def located(work, tile_expert, tile_row, offsets, COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, GROUP_M: tl.constexpr):
    """A work item's expert, its first row, the end of the expert's rows, and its block of columns.

    Items run by expert; within it, by groups of GROUP_M tiles; within a group, column by column, so that tiles that run
    together read the same weights, and the rows of a group stay in the L2 cache.
    """
    tile = work // COLUMNS
    expert = tl.load(tile_expert + tile)
    start, end = tl.load(offsets + expert), tl.load(offsets + expert + 1)
    first_tile = tile - (tl.load(tile_row + tile) - start) // BLOCK_M
    item = work - first_tile * COLUMNS
    group = item // (GROUP_M * COLUMNS) * GROUP_M
    height = tl.minimum((end - start + BLOCK_M - 1) // BLOCK_M - group, GROUP_M)
    item -= group * COLUMNS
    return expert, start + (group + item % height) * BLOCK_M, end, item // height


@jit
def weight_tile(
    weight, expert, part, column, k, N: tl.constexpr, C: tl.constexpr, HEIGHT: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """PARTS parts, from `part` on, of weight [E, HEIGHT, N, C] -> [PARTS * BLOCK_N, BLOCK_K], zeros outside.

    weight: a descriptor of boxes [1, PARTS, BLOCK_N, BLOCK_K] if TMA, else a pointer.
    """
    if TMA:
        tile = weight.load([expert, part, column * BLOCK_N, k]).reshape(PARTS * BLOCK_N, BLOCK_K)
    else:
        out = tl.arange(0, PARTS * BLOCK_N)[:, None]
        n, c = column * BLOCK_N + out % BLOCK_N, k + tl.arange(0, BLOCK_K)[None, :]
        # 64 bits to the expert; inside one, 32 suffice
        matrix = weight + expert.to(tl.int64) * (HEIGHT * N * C)
        tile = tl.load(matrix + ((part + out // BLOCK_N) * N + n) * C + c, mask=(n < N) & (c < C), other=0)
    return tile


@jit
def row_tile(
    x, row, addresses, mine, k, C: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows [BLOCK_M, BLOCK_K]: from `row` on by descriptor if TMA, else at their addresses, where mine.

    By descriptor, rows of the next expert come along; nobody stores what is made of them.
    """
    if TMA:
        tile = x.load([row, k])
    else:
        c = k + tl.arange(0, BLOCK_K)[None, :]
        mask = mine[:, None] if C % BLOCK_K == 0 else mine[:, None] & (c < C)
        tile = tl.load(addresses[:, None] + c, mask=mask, other=0)
    return tile


@jit
def product(
    x, row, addresses, mine, weight, expert, column, N: tl.constexpr, C: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, X_TMA: tl.constexpr, W_TMA: tl.constexpr,
):  # fmt: skip
    """Rows times a block of columns of every part: [BLOCK_M, PARTS * BLOCK_N] float32."""
    acc = tl.zeros((BLOCK_M, PARTS * BLOCK_N), tl.float32)
    for k in range(0, C, BLOCK_K):
        rows = row_tile(x, row, addresses, mine, k, C, BLOCK_K, X_TMA)
        weights = weight_tile(weight, expert, 0, column, k, N, C, PARTS, PARTS, BLOCK_N, BLOCK_K, W_TMA)
        acc = tl.dot(rows, weights.T, acc, input_precision="ieee")
    return acc


@jit
def swapped_product(
    x, row, addresses, mine, weight, expert, column, N: tl.constexpr, C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, X_TMA: tl.constexpr, W_TMA: tl.constexpr,
):  # fmt: skip
    """As `product` of one part.  Its weights are the side of at least 64 rows that wgmma asks for: x may have 16."""
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k in range(0, C, BLOCK_K):
        rows = row_tile(x, row, addresses, mine, k, C, BLOCK_K, X_TMA)
        weights = weight_tile(weight, expert, 0, column, k, N, C, 1, 1, BLOCK_N, BLOCK_K, W_TMA)
        acc = tl.dot(weights, rows.T, acc, input_precision="ieee")
    return acc.T


@jit
def swapped_gate_up(
    x, row, addresses, mine, weight, expert, column, N: tl.constexpr, C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, W_TMA: tl.constexpr,
):  # fmt: skip
    """As `product` of two parts: gate and up, apart, since a box of both would pass through registers here."""
    gate = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    up = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k in range(0, C, BLOCK_K):
        rows = row_tile(x, row, addresses, mine, k, C, BLOCK_K, False).T
        gate_weights = weight_tile(weight, expert, 0, column, k, N, C, 2, 1, BLOCK_N, BLOCK_K, W_TMA)
        up_weights = weight_tile(weight, expert, 1, column, k, N, C, 2, 1, BLOCK_N, BLOCK_K, W_TMA)
        gate = tl.dot(gate_weights, rows, gate, input_precision="ieee")
        up = tl.dot(up_weights, rows, up, input_precision="ieee")
    return gate.T, up.T


@jit
def with_bias(values, bias, expert, n, first, N: tl.constexpr, HEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr):
    """values [BLOCK_M, BLOCK_N] + columns n of part `first` of the expert's row of bias [E, HEIGHT * N]."""
    if HAS_BIAS:
        at = bias + expert.to(tl.int64) * (HEIGHT * N) + first * N + n
        values += tl.load(at, mask=n < N, other=0).to(tl.float32)[None, :]
    return values


@jit
def store_tile(out, row, mine, n, first, values, N: tl.constexpr, HEIGHT: tl.constexpr, BLOCK_M: tl.constexpr):
    """values [BLOCK_M, BLOCK_N] to columns n of part `first` of out [S, HEIGHT * N], where the rows are mine."""
    # 64 bits to the tile, 32 inside it, or addresses alone fill the registers
    at = tl.arange(0, BLOCK_M)[:, None] * (HEIGHT * N) + (first * N + n)[None, :]
    mask = mine[:, None] & (n < N)[None, :]
    tl.store(out + row.to(tl.int64) * (HEIGHT * N) + at, values.to(out.dtype.element_ty), mask=mask)


@jit
def gate_up_kernel(
    x, weight, bias, a, z, order, offsets, tile_expert, tile_row, num_tiles, alpha, limit,
    H: tl.constexpr, I: tl.constexpr, TOP_K: tl.constexpr, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr,
    SAVE_Z: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    SWAPPED: tl.constexpr, W_TMA: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """a [S, I] = act(x[token] W1^T + b1) at the sorted places; z [S, 2I], what the activation is of, if SAVE_Z."""
    await_previous(OVERLAP)
    columns: tl.constexpr = (I + BLOCK_N - 1) // BLOCK_N
    if tl.program_id(0) >= tl.load(num_tiles) * columns:
        return
    expert, row, end, column = located(tl.program_id(0), tile_expert, tile_row, offsets, columns, BLOCK_M, GROUP_M)
    rows = row + tl.arange(0, BLOCK_M)
    mine = rows < end
    addresses = x + (tl.load(order + rows, mask=mine, other=0) // TOP_K).to(tl.int64) * H
    if SWAPPED:
        gate, up = swapped_gate_up(
            x, row, addresses, mine, weight, expert, column, I, H, BLOCK_M, BLOCK_N, BLOCK_K, W_TMA
        )  # fmt: skip
    else:
        acc = product(
            x, row, addresses, mine, weight, expert, column, I, H, 2, BLOCK_M, BLOCK_N, BLOCK_K, False, W_TMA
        )  # fmt: skip
        gate, up = acc.reshape(BLOCK_M, 2, BLOCK_N).permute(0, 2, 1).split()
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    gate = with_bias(gate, bias, expert, n, 0, I, 2, HAS_BIAS)
    up = with_bias(up, bias, expert, n, 1, I, 2, HAS_BIAS)
    if SAVE_Z:
        store_tile(z, row, mine, n, 0, gate, I, 2, BLOCK_M)
        store_tile(z, row, mine, n, 1, up, I, 2, BLOCK_M)
    store_tile(a, row, mine, n, 0, activated(gate, up, alpha, limit, ACTIVATION), I, 1, BLOCK_M)


@jit
def down_kernel(
    a, weight, bias, y, offsets, tile_expert, tile_row, num_tiles,
    H: tl.constexpr, I: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, SWAPPED: tl.constexpr,
    X_TMA: tl.constexpr, W_TMA: tl.constexpr, FLAT: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """y [S, H] = a W2^T + b2, both in the sorted order.

    FLAT: the loads of a program's next item begin under the stores of this one.
    """
    await_previous(OVERLAP)
    columns: tl.constexpr = (H + BLOCK_N - 1) // BLOCK_N
    items = tl.load(num_tiles) * columns
    for work in tl.range(tl.program_id(0), items, tl.num_programs(0), flatten=FLAT):  # pyright: ignore
        expert, row, end, column = located(work, tile_expert, tile_row, offsets, columns, BLOCK_M, GROUP_M)
        rows = row + tl.arange(0, BLOCK_M)
        mine = rows < end
        addresses = row if X_TMA else a + rows.to(tl.int64) * I
        if SWAPPED:
            acc = swapped_product(
                a, row, addresses, mine, weight, expert, column, H, I, BLOCK_M, BLOCK_N, BLOCK_K, X_TMA, W_TMA
            )  # fmt: skip
        else:
            acc = product(
                a, row, addresses, mine, weight, expert, column, H, I, 1, BLOCK_M, BLOCK_N, BLOCK_K, X_TMA, W_TMA
            )  # fmt: skip
        n = column * BLOCK_N + tl.arange(0, BLOCK_N)
        store_tile(y, row, mine, n, 0, with_bias(acc, bias, expert, n, 0, H, 1, HAS_BIAS), H, 1, BLOCK_M)


@jit
def combine_kernel(
    y, weights, inverse, offsets, out, weights_stride_t, weights_stride_k, num_experts,
    H: tl.constexpr, TOP_K: tl.constexpr, BLOCK_H: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """out [T, H]: a token's rows of y times their weights, in slot order; foreign slots are never read."""
    await_previous(OVERLAP)
    token, n = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    foreign = tl.load(offsets + num_experts)
    total = tl.zeros((BLOCK_H,), tl.float32)
    for k in tl.static_range(TOP_K):
        place = tl.load(inverse + token * TOP_K + k)
        owned = place < foreign
        weight = tl.load(weights + token * weights_stride_t + k * weights_stride_k, mask=owned, other=0)
        row = tl.load(y + place.to(tl.int64) * H + n, mask=owned & (n < H), other=0)
        total += weight.to(tl.float32) * row.to(tl.float32)
    tl.store(out + token * H + n, total.to(out.dtype.element_ty), mask=n < H)

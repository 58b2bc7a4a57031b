"""The kernels of the backward pass: products over tiles of one expert's rows, and sums over an expert's rows.

With z = x W1^T + b1, a = act(z), y = a W2^T + b2, out = sum_k s y, g the gradient of out, and p = g W2:
ds = <p, a> + <g, b2>, dz = s p act'(z), dW2 = g^T (s a), dW1 = dz^T x, dx = sum_k dz W1 (SonicMoE, arXiv 2512.14080:
y is not needed).  Every number is written once, by one program: no atomics.

T tokens, K experts a token, E experts, H hidden, I intermediate, S = T*K rows.
"""
# ruff: noqa: E741  (I is the intermediate size)

import triton.language as tl

from moebius.experts.fused.forward_kernels import SWIGLU, located, row_tile, store_tile
from moebius.experts.fused.jit import jit


@jit
def activation_gradient(gate, up, grad, alpha, limit, ACTIVATION: tl.constexpr):
    """The activation, and the gradients of gate and up where it gets `grad`: float32, of one shape.

    SwiGLU: g s(g) u.  Clamped: g s(alpha g) (u + 1), g up to limit, u within +-limit; no gradient beyond these.
    """
    if ACTIVATION == SWIGLU:
        sigmoid = tl.sigmoid(gate)
        half, factor = gate * sigmoid, up
        gate_grad = grad * factor * sigmoid * (1.0 + gate * (1.0 - sigmoid))
        up_grad = grad * half
    else:
        inner = tl.minimum(gate, limit)
        sigmoid = tl.sigmoid(alpha * inner)
        half, factor = inner * sigmoid, tl.minimum(tl.maximum(up, -limit), limit) + 1.0
        gate_grad = grad * factor * sigmoid * (1.0 + alpha * inner * (1.0 - sigmoid))
        gate_grad = tl.where(gate <= limit, gate_grad, 0.0)
        up_grad = tl.where(tl.abs(up) <= limit, grad * half, 0.0)
    return half * factor, gate_grad, up_grad


@jit
def transposed_tile(
    matrix, expert, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """matrix [E, ROWS, COLUMNS], a descriptor if TMA, else a pointer -> [BLOCK_R, BLOCK_C], zeros outside."""
    if TMA:
        tile = matrix.load([expert, row, column]).reshape(BLOCK_R, BLOCK_C)
    else:
        rows, columns = (row + tl.arange(0, BLOCK_R))[:, None], (column + tl.arange(0, BLOCK_C))[None, :]
        # 64 bits to the expert; inside one, 32 suffice
        at = matrix + expert.to(tl.int64) * (ROWS * COLUMNS) + (rows * COLUMNS + columns)
        tile = tl.load(at, mask=(rows < ROWS) & (columns < COLUMNS), other=0.0)
    return tile


@jit
def pieces(tile):
    """[M, N] -> blocks of 32 columns at most, from left to right; no number changes its thread."""
    if tile.shape[1] <= 32:
        result = (tile,)
    else:
        left, right = tile.reshape(tile.shape[0], 2, tile.shape[1] // 2).permute(0, 2, 1).split()
        result = pieces(left) + pieces(right)
    return result


@jit
def finished_piece(
    projected, z, z_grad, scaled, row, mine, weight, n, alpha, limit,
    I: tl.constexpr, BLOCK_M: tl.constexpr, ACTIVATION: tl.constexpr, SAVE_SCALED: tl.constexpr,
):  # fmt: skip
    """Columns n of p: writes dz, and s a if SAVE_SCALED -> their part of <p, a> [BLOCK_M]."""
    projected = projected.to(tl.float32)
    at = tl.arange(0, BLOCK_M)[:, None] * (2 * I) + n[None, :]
    mask = mine[:, None] & (n < I)[None, :]
    z += row.to(tl.int64) * (2 * I)
    gate = tl.load(z + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(z + I + at, mask=mask, other=0.0).to(tl.float32)
    activated, gate_grad, up_grad = activation_gradient(
        gate, up, projected * weight[:, None], alpha, limit, ACTIVATION
    )  # fmt: skip
    store_tile(z_grad, row, mine, n, 0, gate_grad, I, 2, BLOCK_M)
    store_tile(z_grad, row, mine, n, 1, up_grad, I, 2, BLOCK_M)
    if SAVE_SCALED:
        store_tile(scaled, row, mine, n, 0, activated * weight[:, None], I, 1, BLOCK_M)
    return tl.sum(tl.where(mask, projected * activated, 0.0), axis=1)


@jit
def z_gradient_kernel(
    grad, weight, z, slot_weights, order, offsets, tile_expert, tile_row, num_tiles, z_grad, scaled, parts,
    alpha, limit, H: tl.constexpr, I: tl.constexpr, TOP_K: tl.constexpr, ACTIVATION: tl.constexpr,
    SAVE_SCALED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, W_TMA: tl.constexpr,
):  # fmt: skip
    """dz [S, 2I] from grad [T, H] and z; s a [S, I] if SAVE_SCALED; parts [S, blocks of columns]: <p, a> of each block.

    weight: down_proj [E, H, I].  slot_weights [S] float32, by slot.
    """
    columns: tl.constexpr = (I + BLOCK_N - 1) // BLOCK_N
    if tl.program_id(0) >= tl.load(num_tiles) * columns:
        return
    expert, row, end, column = located(
        tl.program_id(0), tile_expert, tile_row, offsets, columns, BLOCK_M, GROUP_M
    )  # fmt: skip
    rows = row + tl.arange(0, BLOCK_M)
    mine = rows < end
    slots = tl.load(order + rows, mask=mine, other=0)
    addresses = grad + (slots // TOP_K).to(tl.int64) * H
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in tl.range(0, H, BLOCK_K):
        left = row_tile(grad, row, addresses, mine, k, H, BLOCK_K, False)
        right = transposed_tile(weight, expert, k, column * BLOCK_N, H, I, BLOCK_K, BLOCK_N, W_TMA)
        acc = tl.dot(left, right, acc, input_precision="ieee")
    routing_weight = tl.load(slot_weights + slots, mask=mine, other=0.0)
    # narrowed at once and finished 32 columns at a time: finished as a whole, the tile spills registers
    narrow = pieces(acc.to(grad.dtype.element_ty))
    WIDTH: tl.constexpr = narrow[0].shape[1]
    total = tl.zeros((BLOCK_M,), tl.float32)
    for piece in tl.static_range(BLOCK_N // WIDTH):
        n = column * BLOCK_N + piece * WIDTH + tl.arange(0, WIDTH)
        total += finished_piece(
            narrow[piece], z, z_grad, scaled, row, mine, routing_weight, n, alpha, limit,
            I, BLOCK_M, ACTIVATION, SAVE_SCALED,
        )  # fmt: skip
    tl.store(parts + rows.to(tl.int64) * columns + column, total, mask=mine)


@jit
def rows_gradient_kernel(
    z_grad, weight, offsets, tile_expert, tile_row, num_tiles, rows_grad,
    C: tl.constexpr, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, X_TMA: tl.constexpr, W_TMA: tl.constexpr,
):  # fmt: skip
    """rows_grad [S, N] = z_grad [S, C] times weight [E, C, N], at the sorted places; foreign rows are not written."""
    columns: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    if tl.program_id(0) >= tl.load(num_tiles) * columns:
        return
    expert, row, end, column = located(
        tl.program_id(0), tile_expert, tile_row, offsets, columns, BLOCK_M, GROUP_M
    )  # fmt: skip
    rows = row + tl.arange(0, BLOCK_M)
    mine = rows < end
    addresses = row if X_TMA else z_grad + rows.to(tl.int64) * C
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in tl.range(0, C, BLOCK_K):
        left = row_tile(z_grad, row, addresses, mine, k, C, BLOCK_K, X_TMA)
        right = transposed_tile(weight, expert, k, column * BLOCK_N, C, N, BLOCK_K, BLOCK_N, W_TMA)
        acc = tl.dot(left, right, acc, input_precision="ieee")
    store_tile(rows_grad, row, mine, column * BLOCK_N + tl.arange(0, BLOCK_N), 0, acc, N, 1, BLOCK_M)


@jit
def owned_rows(matrix, rows, mine, n, N: tl.constexpr):
    """matrix [..., N] at rows and columns n; zeros in rows that are not mine, as these may hold NaN."""
    mask = mine[:, None] & (n < N)[None, :]
    return tl.load(matrix + rows.to(tl.int64)[:, None] * N + n[None, :], mask=mask, other=0.0)


@jit
def weight_gradient_kernel(
    left, right, order, offsets, largest_first, weight_grad,
    M: tl.constexpr, N: tl.constexpr, TOP_K: tl.constexpr, LEFT_BY_TOKEN: tl.constexpr, RIGHT_BY_TOKEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, OUT_TMA: tl.constexpr,
):  # fmt: skip
    """weight_grad [E, M, N] = left^T right over each expert's rows; zeros for an expert without any.

    left [S, M], right [S, N] by sorted place, or [T, ...] by token.  largest_first [E]: experts, by number of rows.
    """
    heights: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    widths: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    expert = tl.load(largest_first + tl.program_id(0) // (heights * widths)).to(tl.int32)
    tile = tl.program_id(0) % (heights * widths)
    height, width = tl.swizzle2d(tile // widths, tile % widths, heights, widths, GROUP_M)  # pyright: ignore
    m, n = height * BLOCK_M + tl.arange(0, BLOCK_M), width * BLOCK_N + tl.arange(0, BLOCK_N)
    start, end = tl.load(offsets + expert), tl.load(offsets + expert + 1)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # read one step ahead: no product waits for the numbers of its own rows
    slots = tl.load(order + start + tl.arange(0, BLOCK_K), mask=start + tl.arange(0, BLOCK_K) < end, other=0)
    for row in tl.range(start, end, BLOCK_K):
        rows = row + tl.arange(0, BLOCK_K)
        tokens = slots // TOP_K
        ours = owned_rows(left, tokens if LEFT_BY_TOKEN else rows, rows < end, m, M)
        theirs = owned_rows(right, tokens if RIGHT_BY_TOKEN else rows, rows < end, n, N)
        acc = tl.dot(ours.trans(), theirs, acc, input_precision="ieee")
        slots = tl.load(order + rows + BLOCK_K, mask=rows + BLOCK_K < end, other=0)
    store_matrix(weight_grad, expert, height * BLOCK_M, width * BLOCK_N, acc, M, N, BLOCK_M, BLOCK_N, OUT_TMA)


@jit
def store_matrix(
    out, expert, row, column, values, M: tl.constexpr, N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """values [BLOCK_M, BLOCK_N] into out [E, M, N], a descriptor if TMA, else a pointer."""
    if TMA:
        out.store([expert, row, column], values.to(out.dtype).reshape(1, BLOCK_M, BLOCK_N))
    else:
        rows, columns = (row + tl.arange(0, BLOCK_M))[:, None], (column + tl.arange(0, BLOCK_N))[None, :]
        at = out + expert.to(tl.int64) * (M * N) + (rows * N + columns)
        tl.store(at, values.to(out.dtype.element_ty), mask=(rows < M) & (columns < N))


@jit
def bias_gradient_kernel(
    matrix, slot_weights, order, offsets, bias_grad,
    N: tl.constexpr, TOP_K: tl.constexpr, BY_TOKEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """bias_grad [E, N]: each expert's rows added in float32: of matrix [S, N], or of s matrix [T, N] if BY_TOKEN."""
    expert, n = tl.program_id(0), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    start, end = tl.load(offsets + expert), tl.load(offsets + expert + 1)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for row in tl.range(start, end, BLOCK_M):
        rows = row + tl.arange(0, BLOCK_M)
        mine = rows < end
        if BY_TOKEN:
            slots = tl.load(order + rows, mask=mine, other=0)
            weight = tl.load(slot_weights + slots, mask=mine, other=0.0)
            total += owned_rows(matrix, slots // TOP_K, mine, n, N).to(tl.float32) * weight[:, None]
        else:
            total += owned_rows(matrix, rows, mine, n, N).to(tl.float32)
    sums = tl.sum(total, axis=0).to(bias_grad.dtype.element_ty)
    tl.store(bias_grad + expert.to(tl.int64) * N + n, sums, mask=n < N)


@jit(do_not_specialize=["slots"])
def slot_weights_gradient_kernel(
    parts, grad, bias, top_k_index, inverse, offsets, weights_grad, slots, num_experts,
    H: tl.constexpr, TOP_K: tl.constexpr, PARTS: tl.constexpr, PARTS_BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """ds [S] by slot: parts [S, PARTS] added up, and <grad, b2>; zero for a foreign slot."""
    slot = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    place = tl.load(inverse + slot, mask=slot < slots, other=0)
    mine = (slot < slots) & (place < tl.load(offsets + num_experts))
    total = tl.sum(owned_rows(parts, place, mine, tl.arange(0, PARTS_BLOCK), PARTS), axis=1)
    if HAS_BIAS:
        expert = tl.load(top_k_index + slot, mask=mine, other=0)
        dots = tl.zeros((BLOCK_S, BLOCK_H), tl.float32)
        for h in tl.range(0, H, BLOCK_H):
            n = h + tl.arange(0, BLOCK_H)
            ours = owned_rows(grad, slot // TOP_K, mine, n, H).to(tl.float32)
            dots += ours * owned_rows(bias, expert, mine, n, H).to(tl.float32)
        total += tl.sum(dots, axis=1)
    tl.store(weights_grad + slot, total.to(weights_grad.dtype.element_ty), mask=slot < slots)

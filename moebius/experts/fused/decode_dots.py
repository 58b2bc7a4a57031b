"""Rows of 4-bit or 8-bit integers against one vector, through matrix instructions: two weights are made bfloat16 by one
or two operations on bits, and nothing is multiplied one by one.

A thread loads 16 bytes of a row, and four threads, a quad, stand next to each other on QUAD inputs; a block has SPLITS
quads on a row.  In a product [R * SPLITS, K] x [K, 8] a row is one quad of one row of weights, and a column one run of
the vector: QUAD inputs, or, where scales are of fewer, one thread's, with zeros at the others' places.  What is wanted
stands where the run is of the quad, and `diagonal` takes it.  Inputs are put into an order in which every thread
already holds its part of both operands.

A word holds two bfloat16.  A code of 4 bits is set into the highest bits of the mantissa of 16, which makes 16 + code,
and what that exceeds the integer by is taken off the sum: 24 times the inputs' sum, of the order of the products.  Of
an int8, the low seven bits are the mantissa of 128, and the sign makes another number, -128 or -256.

R rows, L = SPLITS * 4 threads on a row, RUN inputs of a run, BK of a block.
"""
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

from moebius.experts.fused.jit import jit
from moebius.experts.fused.quantized_values import INT4

RUN_COLUMNS = tl.constexpr(8)
"""Columns of the smallest matrix instruction."""


@triton.constexpr_function
def quad_size(kind):
    """Inputs of 64 bytes."""
    return 128 if kind == INT4.value else 64


@jit
def quad_inputs(
    x_ptr, k, owned, WIDTH: tl.constexpr, RUN: tl.constexpr, BK: tl.constexpr, PART: tl.constexpr, KIND: tl.constexpr
):
    """Eight inputs of each thread, from its 8 * PART on: [32, 8], a column for each run (or again for the same)."""
    QUAD: tl.constexpr = quad_size(KIND)
    thread = tl.arange(0, 32)
    quad = thread // 4 // (QUAD // RUN) % (BK // QUAD)
    first = k + quad * QUAD + thread % 4 * (QUAD // 4) + 8 * PART
    if RUN < QUAD:
        owned = owned & (thread % 4 == thread // 4 % 4)[:, None]
    columns = first[:, None] + tl.arange(0, 8)[None, :]
    x = tl.load(x_ptr + columns, mask=owned & (columns < WIDTH), other=0.0)
    x = tl.reshape(x, (8, 4, 2, 2, 2))
    # the last three: of a word's eight codes, half and two bits of the place in it; of two words of four, word and half
    x = tl.permute(x, (3, 1, 4, 2, 0)) if KIND == INT4 else tl.permute(x, (2, 1, 4, 3, 0))
    return tl.reshape(x, (32, 8))


@jit
def halves(words):
    """uint32 [R, L] -> bfloat16 [R, L, 2]."""
    low = (words & 0xFFFF).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return tl.join(low, (words >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True))


@jit
def operand(w0, w1, w2, w3, SPLITS: tl.constexpr, dtype: tl.constexpr):
    """Four words of each thread, two numbers in each: [R * SPLITS, 32]."""
    R: tl.constexpr = w0.shape[0]
    numbers = tl.join(tl.join(halves(w0), halves(w1)), tl.join(halves(w2), halves(w3)))
    numbers = tl.permute(tl.reshape(numbers, (R, SPLITS, 4, 2, 2, 2)), (0, 1, 5, 2, 4, 3))
    return tl.reshape(numbers, (R * SPLITS, 32)).to(dtype)


@jit
def int4_dot(words, x, magic, SPLITS: tl.constexpr, acc):
    """Adds (16 + code) * x of one word of each thread."""
    w0, w1 = ((words << 3) & 0x00780078) | magic, ((words >> 1) & 0x00780078) | magic
    w2, w3 = ((words >> 5) & 0x00780078) | magic, ((words >> 9) & 0x00780078) | magic
    return tl.dot(operand(w0, w1, w2, w3, SPLITS, x.dtype), x, acc, input_precision="ieee")


@jit
def int8_dot(first, second, x, magic, SPLITS: tl.constexpr, acc):
    """Adds value * x of two words of each thread: 128 + the low seven bits, and -128, or -256 where the value is below
    zero.
    """
    w1, w3 = first >> 8, second >> 8
    lows = operand(
        (first & 0x007F007F) | magic, (w1 & 0x007F007F) | magic, (second & 0x007F007F) | magic,
        (w3 & 0x007F007F) | magic, SPLITS, x.dtype,
    )  # fmt: skip
    minus = magic | 0x80008000
    signs = operand(
        (first & 0x00800080) | minus, (w1 & 0x00800080) | minus, (second & 0x00800080) | minus,
        (w3 & 0x00800080) | minus, SPLITS, x.dtype,
    )  # fmt: skip
    acc = tl.dot(lows, x, acc, input_precision="ieee")
    return tl.dot(signs, x, acc, input_precision="ieee")


@jit
def int4_offset(x0, x1, x2, x3, magic, SPLITS: tl.constexpr):
    """24 times each run's sum of inputs: [SPLITS, 8]."""
    ROWS: tl.constexpr = 16 // SPLITS
    word = tl.zeros((ROWS, SPLITS * 4), tl.uint32) | magic
    sixteens = operand(word, word, word, word, SPLITS, x0.dtype)
    acc = tl.dot(sixteens, x0, input_precision="ieee")
    acc = tl.dot(sixteens, x1, acc, input_precision="ieee")
    acc = tl.dot(sixteens, x2, acc, input_precision="ieee")
    acc = tl.dot(sixteens, x3, acc, input_precision="ieee")
    return tl.sum(tl.reshape(acc, (ROWS, SPLITS, 8)), axis=0) * (24.0 / 16.0 / ROWS)


@jit
def dot_products(
    x_ptr, values_ptr, rows, keep, owned, k, magic, WIDTH: tl.constexpr, KIND: tl.constexpr, RUN: tl.constexpr,
    BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """As `decode_kernels.run_products`, of values in words of 32 bits: [R, SPLITS * 8], of which `diagonal` counts."""
    R: tl.constexpr = rows.shape[0]
    SPLITS: tl.constexpr = BK // quad_size(KIND)
    PER_WORD: tl.constexpr = quad_size(KIND) // 16
    words = k // PER_WORD + tl.arange(0, SPLITS * 16)
    mask = keep[:, None] & (words < WIDTH // PER_WORD)[None, :]
    values = tl.load(values_ptr + rows[:, None] * (WIDTH // PER_WORD) + words[None, :], mask=mask, other=0)
    even, odd = tl.split(tl.reshape(values.to(tl.uint32, bitcast=True), (R, SPLITS * 4, 2, 2)))
    w0, w2 = tl.split(even)
    w1, w3 = tl.split(odd)
    if PDL:
        tl.extra.cuda.gdc_wait()
    magic = magic.to(tl.uint32, bitcast=True)
    acc = tl.zeros((R * SPLITS, 8), tl.float32)
    x0 = quad_inputs(x_ptr, k, owned, WIDTH, RUN, BK, 0, KIND)
    x1 = quad_inputs(x_ptr, k, owned, WIDTH, RUN, BK, 1, KIND)
    if KIND == INT4:
        x2 = quad_inputs(x_ptr, k, owned, WIDTH, RUN, BK, 2, KIND)
        x3 = quad_inputs(x_ptr, k, owned, WIDTH, RUN, BK, 3, KIND)
        acc = int4_dot(w0, x0, magic, SPLITS, acc)
        acc = int4_dot(w1, x1, magic, SPLITS, acc)
        acc = int4_dot(w2, x2, magic, SPLITS, acc)
        acc = int4_dot(w3, x3, magic, SPLITS, acc)
        products = tl.reshape(acc, (R, SPLITS, 8)) - int4_offset(x0, x1, x2, x3, magic, SPLITS)[None, :, :]
    else:
        acc = int8_dot(w0, w1, x0, magic, SPLITS, acc)
        products = int8_dot(w2, w3, x1, magic, SPLITS, acc)
    return tl.reshape(products, (R, SPLITS * 8))


@jit
def over_columns(scales, KIND: tl.constexpr, RUN: tl.constexpr, BK: tl.constexpr):
    """Of runs, [R, BK / RUN] -> [R, SPLITS * 8]; [R, 1] stays."""
    R: tl.constexpr = scales.shape[0]
    SPLITS: tl.constexpr = BK // quad_size(KIND)
    if quad_size(KIND) > RUN:
        scales = tl.reshape(tl.broadcast_to(scales[:, None, :], (R, SPLITS, 8)), (R, SPLITS * 8))
    elif scales.shape[1] > 1:
        scales = tl.reshape(tl.broadcast_to(scales[:, :, None], (R, SPLITS, 8)), (R, SPLITS * 8))
    return scales


@jit
def diagonal(total, KIND: tl.constexpr, RUN: tl.constexpr):
    """[R, SPLITS * 8], zero but where a quad of weights met a run of its own inputs."""
    column = tl.arange(0, total.shape[1])
    return tl.where((column // 8 == column % 8 // (quad_size(KIND) // RUN))[None, :], total, 0.0)

"""Values of quantized forms to numbers, in registers.  Layouts: `moebius.quantization.forms`.

A word is 32 bits of 4-bit codes: code i of it stands at bits 4i..4i+3 and belongs to input 8 * word + i.  Nothing here
converts integers one by one: bits are set into the mantissa of a float whose unit is known.

A run is what one thread loads at once, 16 bytes of values: a scale belongs to whole runs.

R rows, W words, C codes (8 a word), BK inputs of a block.
"""
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

import triton.language as tl

from moebius.experts.fused.jit import jit

PLAIN = tl.constexpr(0)
INT8 = tl.constexpr(1)
FP8 = tl.constexpr(2)
INT4 = tl.constexpr(3)  # from here on, words of 4-bit codes
MXFP4 = tl.constexpr(4)


@jit
def scale_numbers(scales):
    """Scales as float32: floats of any dtype, or e8m0 bytes: 2^(byte - 127), and 255 is NaN (OCP Microscaling Formats
    v1.0, section 5.4.1).
    """
    if scales.dtype == tl.uint8:
        bits = scales.to(tl.uint32)
        # 2^-127 has no exponent of its own in float32: it is half of the smallest normal number
        bits = tl.where(bits == 255, 0x7FC00000, tl.where(bits == 0, 0x00400000, bits << 23))
        numbers = bits.to(tl.uint32).to(tl.float32, bitcast=True)
    else:
        numbers = scales.to(tl.float32)
    return numbers


@jit
def run_scales(
    scales_ptr, scale_rows, keep, k, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, RUN: tl.constexpr, BK: tl.constexpr
):
    """The scale of each run, [R, BK / RUN] or, where a row shares one, [R, 1]; COLUMNS inputs share a scale."""
    if COLUMNS >= WIDTH:
        scales = tl.load(scales_ptr + scale_rows, mask=keep, other=0)[:, None]
    else:
        PER_ROW: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
        columns = (k // RUN + tl.arange(0, BK // RUN)) // (COLUMNS // RUN)
        mask = keep[:, None] & (columns < PER_ROW)[None, :]
        scales = tl.load(scales_ptr + scale_rows[:, None] * PER_ROW + columns[None, :], mask=mask, other=0)
    return scale_numbers(scales)


@jit
def word_planes(numbers, WORDS: tl.constexpr):
    """[C] -> eight [W]: plane i holds what belongs to code i of each word."""
    even, odd = tl.split(tl.reshape(numbers, (WORDS, 2, 2, 2)))
    c04, c26 = tl.split(even)
    c15, c37 = tl.split(odd)
    c0, c4 = tl.split(c04)
    c1, c5 = tl.split(c15)
    c2, c6 = tl.split(c26)
    c3, c7 = tl.split(c37)
    return c0, c1, c2, c3, c4, c5, c6, c7


@jit
def int8_numbers(values):
    """int8 as float32: value + 128 in the mantissa of 2^23, which one subtraction takes off again."""
    bits = values.to(tl.uint8, bitcast=True).to(tl.uint32) ^ 0x4B000080
    return bits.to(tl.float32, bitcast=True) - 8388736.0


@jit
def int4_number(words, two_to_23, PLACE: tl.constexpr):
    """The integer -8..7 that is stored as code + 8 at bits PLACE.. (at most 19) of words, as float32.

    With the code in the mantissa of 2^23 the float is 2^23 + code * 2^PLACE: one multiply-add gives the integer.
    """
    MASK: tl.constexpr = 15 << PLACE
    UNIT: tl.constexpr = 1.0 / (1 << PLACE)
    OFFSET: tl.constexpr = 8388608.0 / (1 << PLACE) + 8.0
    number = ((words & MASK) | two_to_23).to(tl.float32, bitcast=True)
    return number * UNIT - OFFSET


@jit
def int4_products(words, x, two_to_23):
    """sum_i code_i(words) * x_i: words [R, W] uint32, x eight [1, W] -> [R, W] float32."""
    high = words >> 12
    total = int4_number(words, two_to_23, 0) * x[0]
    total += int4_number(words, two_to_23, 4) * x[1]
    total += int4_number(words, two_to_23, 8) * x[2]
    total += int4_number(words, two_to_23, 12) * x[3]
    total += int4_number(words, two_to_23, 16) * x[4]
    total += int4_number(high, two_to_23, 8) * x[5]
    total += int4_number(high, two_to_23, 12) * x[6]
    total += int4_number(high, two_to_23, 16) * x[7]
    return total


@jit
def e2m1_pair(words, SIGN: tl.constexpr, MAGNITUDE: tl.constexpr):
    """Codes i and i + 4 of words, times 2^-14, as float32.  Shifts to the left that bring their sign to bit 15 of each
    half and their magnitude to bits 9..11, where float16 reads it as such, subnormal 0.5 included.
    """
    sign = (words << SIGN) & 0x80008000
    magnitude = (words << MAGNITUDE) & 0x0E000E00
    halves = sign | magnitude
    low = (halves & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
    high = (halves >> 16).to(tl.uint16).to(tl.float16, bitcast=True)
    return low.to(tl.float32), high.to(tl.float32)


@jit
def mxfp4_products(words, x):
    """sum_i code_i(words) * x_i: words [R, W] uint32, x eight [1, W] -> [R, W] float32."""
    c0, c4 = e2m1_pair(words, 12, 9)
    c1, c5 = e2m1_pair(words, 8, 5)
    c2, c6 = e2m1_pair(words, 4, 1)
    c3, c7 = e2m1_pair(words >> 3, 3, 0)
    total = c0 * x[0]
    total += c1 * x[1]
    total += c2 * x[2]
    total += c3 * x[3]
    total += c4 * x[4]
    total += c5 * x[5]
    total += c6 * x[6]
    total += c7 * x[7]
    return total * 16384.0


@jit
def int4_numbers(words, two_to_23):
    """words [R, W] uint32 -> their integers [R, C] float32, in the order of the inputs."""
    high = words >> 12
    c04 = tl.join(int4_number(words, two_to_23, 0), int4_number(words, two_to_23, 16))
    c26 = tl.join(int4_number(words, two_to_23, 8), int4_number(high, two_to_23, 12))
    c15 = tl.join(int4_number(words, two_to_23, 4), int4_number(high, two_to_23, 8))
    c37 = tl.join(int4_number(words, two_to_23, 12), int4_number(high, two_to_23, 16))
    numbers = tl.join(tl.join(c04, c26), tl.join(c15, c37))
    return tl.reshape(numbers, (words.shape[0], words.shape[1] * 8))


@jit
def mxfp4_numbers(words):
    """words [R, W] uint32 -> their numbers [R, C] float32, in the order of the inputs."""
    c0, c4 = e2m1_pair(words, 12, 9)
    c1, c5 = e2m1_pair(words, 8, 5)
    c2, c6 = e2m1_pair(words, 4, 1)
    c3, c7 = e2m1_pair(words >> 3, 3, 0)
    even = tl.join(tl.join(c0, c4), tl.join(c2, c6))
    odd = tl.join(tl.join(c1, c5), tl.join(c3, c7))
    # not in the scale, which may be as large as 2^127
    return tl.reshape(tl.join(even, odd), (words.shape[0], words.shape[1] * 8)) * 16384.0

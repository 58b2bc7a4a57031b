"""The formats as their definitions read, number by number in plain Python: what judges the tensor code."""

import math


def e4m3(byte: int) -> float:
    """OCP 8-bit floating point: sign, 4 bits of exponent with bias 7, 3 of mantissa; all ones is NaN, no infinity."""
    sign, exponent, mantissa = -1.0 if byte >> 7 else 1.0, byte >> 3 & 15, byte & 7
    if (exponent, mantissa) == (15, 7):
        return math.nan
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def e2m1(code: int) -> float:
    """OCP MX v1.0, table 5: sign, 2 bits of exponent with bias 1, 1 of mantissa."""
    sign, exponent, mantissa = -1.0 if code >> 3 else 1.0, code >> 1 & 3, code & 1
    return sign * (mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1))


def e8m0(byte: int) -> float:
    """OCP MX v1.0, section 5.4.1: a power of two with bias 127; all ones is NaN."""
    return math.nan if byte == 255 else 2.0 ** (byte - 127)


def nibble(words: list[int], index: int, bits: int) -> int:
    """The 4-bit code at `index` of words of so many bits, the lowest of each word first."""
    per_word = bits // 4
    return words[index // per_word] >> 4 * (index % per_word) & 15

"""Quantized forms of a weight: their layout, and how they are packed and unpacked, a matrix at a time."""

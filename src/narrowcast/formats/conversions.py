"""Compiled loops between the widths of IEEE 754, of numbers that keep their format, and for exponents alone (E8M0)."""

from __future__ import annotations

from typing import Any

import numpy as np

from narrowcast.formats.vectors import loop

__all__ = ["convert", "copy_quiet", "decode_exponents", "encode_exponents"]


@loop
def convert(x: Any, out: Any) -> None:
    """Write float32 or float64 numbers as the other, rounded to nearest even; a NaN is quiet: shapes [n]."""
    for i in range(x.size):
        out[i] = x[i]


@loop
def copy_quiet(codes: Any, mask: Any, infinity: Any, quiet: Any, out: Any) -> None:
    """Write codes as they are, but NaN quiet.

    Args:
        codes: Shape [n], unsigned.
        mask: The exponent and significand bits, of the codes' dtype as the next two.
        infinity: The code of infinity; magnitudes above it are NaN.
        quiet: The bit that a quiet NaN has.
        out: Shape [n], of the codes' dtype.
    """
    nothing = quiet ^ quiet
    for i in range(codes.size):
        out[i] = codes[i] | (quiet if (codes[i] & mask) > infinity else nothing)


@loop
def encode_exponents(words: Any, constants: Any, out: Any) -> None:
    """Write the E8M0 codes of float32 numbers.

    A number is rounded by the addition of what the rounding is short of a whole binade. Below float32's normal numbers,
    2**-126, one edge tells code 0 from code 1.

    Args:
        words: Bits of float32, shape [n], uint32.
        constants: ``added`` to the bits; ``edge`` from which a subnormal number has code 1; the codes of what is too large,
            infinite, NaN and zero; the code of negative numbers and of minus infinity, or 256 to drop the sign: shape [8],
            uint32.
        out: Codes, shape [n], uint8.
    """
    added, edge, beyond, infinite = constants[0], constants[1], constants[2], constants[3]
    nan, zero, negative, minus_infinite = constants[4], constants[5], constants[6], constants[7]
    for i in range(words.size):
        magnitude = words[i] & np.uint32(0x7FFFFFFF)
        code = np.uint32(magnitude + added) >> np.uint32(23)
        code = np.uint32(magnitude >= edge) if magnitude < np.uint32(0x800000) else code
        code = beyond if code > np.uint32(254) else code
        code = infinite if magnitude == np.uint32(0x7F800000) else code
        below = minus_infinite if magnitude == np.uint32(0x7F800000) else negative
        code = below if (words[i] != magnitude) & (below != np.uint32(256)) else code
        code = zero if magnitude == np.uint32(0) else code
        out[i] = nan if magnitude > np.uint32(0x7F800000) else code


@loop
def decode_exponents(codes: Any, out: Any) -> None:
    """Write the values of E8M0 codes as float32 or float64: shapes [n]."""
    for i in range(codes.size):
        code = np.uint32(codes[i])
        word = np.uint32(code << np.uint32(23))
        word = np.uint32(0x400000) if code == np.uint32(0) else word  # 2**-127, which float32 holds as a subnormal
        word = np.uint32(0x7FC00000) if code == np.uint32(255) else word
        out[i] = np.uint32(word).view(np.float32)

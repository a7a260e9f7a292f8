"""encode, decode and cast on NumPy arrays: each piece of an array by the quickest way that is exact.

Arrays are cut so that what is worked on stays in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from narrowcast.errors import FormatError
from narrowcast.formats.arrays import Opened, code_dtype
from narrowcast.formats.codebooks import codebook_codes, codebook_edges
from narrowcast.formats.engine import engine
from narrowcast.formats.kinds import Codebook, ElementFormat, Format, Integer
from narrowcast.formats.native import encode_natively
from narrowcast.formats.portable import SpecialCodes
from narrowcast.formats.rules import NanInput, Overflow, Rounding, Rules
from narrowcast.formats.table import ELEMENTS
from narrowcast.formats.tables import (
    by_arithmetic,
    by_table,
    casting_table,
    decode_exactly,
    decoded_by_arithmetic,
    encode_exactly,
    encoding_table,
    exact_in_float32,
    special_codes,
    values_of,
)

__all__ = [
    "Encoding",
    "by_rint",
    "cast",
    "codebook_edges",
    "decode",
    "decode_part",
    "encode",
    "encode_part",
    "exact_in_float32",
]

_PIECE = 1 << 16  # elements that compiled loops pass on to each other: they stay in the cache
_SINGLE = np.dtype(np.float32)
_FP16 = ELEMENTS["fp16"]
_WIDE: dict[ElementFormat, type[np.floating]] = {ELEMENTS["fp32"]: np.float32, ELEMENTS["fp64"]: np.float64}


class Encoding(NamedTuple):
    """A format and rules with what follows from them, worked out once: a call on a few numbers is short.

    Args:
        format: What to encode to.
        rules: What to do where the format gives a choice.
        dtype: Of the codes.
        special: For the loop that writes the codes of float32 numbers in one pass; None where the rules are not those of
            arithmetic.
    """

    format: ElementFormat
    rules: Rules
    dtype: np.dtype[Any]
    special: SpecialCodes | None

    @staticmethod
    @lru_cache(maxsize=256)
    def of(format: ElementFormat, rules: Rules) -> Encoding:
        """Return what the two come to."""
        arithmetic = isinstance(format, Format) and rules.rounding is Rounding.NEAREST_EVEN and by_arithmetic(format)
        special = special_codes(format, rules) if arithmetic else None
        return Encoding(format, rules, np.dtype(code_dtype(format.bits)), special)


def encode(source: Opened, to: Encoding, seed: int) -> np.ndarray:
    """Return the codes of ``source``, in its shape."""
    x = source.array
    codes = np.empty(x.shape, to.dtype)
    if to.special is not None and source.coded is None and x.dtype == _SINGLE and engine().COMPILED:
        _encode_part(x.reshape(-1), to, codes.reshape(-1), 0, seed)  # one pass: the cache plays no part
        return codes
    for part, out, start in _parts(x, codes):
        _encode_part(_numbers(part, source.coded), to, out, start, seed)
    return codes


def _numbers(x: np.ndarray, coded: str | None) -> np.ndarray:
    """Return a piece of an array as the numbers that it holds: codes of a dtype that NumPy lacks as float32."""
    return x if coded is None else decode(x, ELEMENTS[coded], "float32")


def encode_part(x: np.ndarray, format: ElementFormat, rules: Rules, out: np.ndarray, start: int, seed: int) -> None:
    """Encode one contiguous piece of float64, float32 or float16 numbers into ``out``.

    Args:
        x: Numbers, shape [n], contiguous.
        format: What to encode to.
        rules: What to do where the format gives a choice.
        out: Codes, shape [n].
        start: Position of the piece in the whole array.
        seed: Of stochastic rounding.
    """
    _encode_part(x, Encoding.of(format, rules), out, start, seed)


def _encode_part(x: np.ndarray, to: Encoding, out: np.ndarray, start: int, seed: int) -> None:
    format, rules, _, special = to
    if x.dtype == np.float16:
        x = decode(x.view(np.uint16), _FP16, "float32")
    _check_nan(x, format, rules, start)
    if special is not None and isinstance(format, Format):
        single = x if x.dtype == _SINGLE else engine().narrowed_to_odd(x)
        _encode_by_arithmetic(single, format, special, out)
    elif isinstance(format, Codebook):
        out[...] = codebook_codes(_without_nan(x, format, rules), format, rules, start, seed)
    elif isinstance(format, Integer) and by_rint(format, rules):
        _encode_by_rint(x, format, out)
    elif x.dtype == _SINGLE and by_table(format, rules):
        engine().codes_by_half(x, encoding_table(format, rules), out)
    elif format in _WIDE and (rules.rounding, rules.overflow) == (Rounding.NEAREST_EVEN, Overflow.IEEE):
        _convert(x, out.view(_WIDE[format]))
    else:
        out[...] = encode_exactly(x, format, rules, start, seed)


def _convert(x: np.ndarray, out: np.ndarray) -> None:
    """Write float32 or float64 numbers as either, rounded to nearest even; a NaN is quiet."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        np.copyto(out, x, casting="same_kind")
    if x.dtype == out.dtype:  # then a NaN was copied as it is
        lost = np.isnan(out)
        if lost.any():
            words, quiet = (np.uint32, 1 << 22) if out.dtype == np.float32 else (np.uint64, 1 << 51)
            out.view(words)[lost] |= words(quiet)


def _check_nan(x: np.ndarray, format: ElementFormat, rules: Rules, start: int) -> None:
    if (isinstance(format, Format) and format.has_nan) or rules.nan is not NanInput.ERROR:
        return
    if np.isnan(engine().absmax(x[None])[0] if x.dtype == np.float32 and x.size else x).any():
        nan = np.isnan(x)
        raise FormatError(
            f"NaN at position {start + int(nan.argmax())}, and {format.name} has none",
            allowed="numbers and infinities",
            next_step="give nan='zero' or nan='max'",
        )


def _without_nan(x: np.ndarray, format: Codebook, rules: Rules) -> np.ndarray:
    if rules.nan is NanInput.ERROR:  # there is none then
        return x
    lost = np.isnan(x)
    return np.where(lost, format.max if rules.nan is NanInput.MAX else 0.0, x.astype(np.float64)) if lost.any() else x


def by_rint(format: Integer, rules: Rules) -> bool:
    """Return whether ``np.rint`` and clipping do what the rules ask of an integer."""
    return (
        rules.rounding is Rounding.NEAREST_EVEN and rules.overflow is not Overflow.WRAP and rules.nan is NanInput.ERROR
    )


def _encode_by_rint(x: np.ndarray, format: Integer, out: np.ndarray) -> None:
    with np.errstate(over="ignore"):  # infinity is clamped like any other number
        steps = np.rint(x * format.step**-1) if format.fraction_bits else np.rint(x)
    np.clip(steps, format.min / format.step, format.max / format.step, out=steps)
    out[...] = steps.astype(np.int32)
    out &= (1 << format.bits) - 1


def _encode_by_arithmetic(x: np.ndarray, format: Format, special: SpecialCodes, out: np.ndarray) -> None:
    if not engine().COMPILED and encode_natively(x, format, out):
        large = (out & format.magnitude_mask) >= format.max_code  # overflow, perhaps; infinity; NaN
        rest = x[large]
        if rest.size:
            codes = np.empty(rest.shape, out.dtype)
            engine().rounded_to_nearest(rest, format, special, codes)
            out[large] = codes
    else:
        engine().rounded_to_nearest(x, format, special, out)


def decode(codes: np.ndarray, format: ElementFormat, dtype: str) -> np.ndarray:
    """Return the values of unsigned codes in ``dtype``, rounded to it where it does not hold them."""
    values = np.empty(codes.shape, dtype)
    if engine().COMPILED and decoded_by_arithmetic(format):
        decode_part(codes.reshape(-1), format, values.reshape(-1))  # one pass: the cache plays no part
        return values
    for part, out, _ in _parts(codes, values):
        decode_part(part, format, out)
    return values


def decode_part(codes: np.ndarray, format: ElementFormat, out: np.ndarray) -> None:
    """Write the values of one contiguous piece of codes as float32 or float64."""
    if decoded_by_arithmetic(format) and isinstance(format, Format) and engine().decoded_floats(codes, format, out):
        return
    if format in _WIDE:
        _convert(codes.view(_WIDE[format]), out)
    elif format.bits <= 16:
        engine().decoded(codes, values_of(format, out.dtype.name), out)
    else:
        with np.errstate(over="ignore"):
            out[...] = decode_exactly(codes, format)


def cast(source: Opened, to: Encoding, seed: int) -> np.ndarray:
    """Return ``source`` rounded to the numbers of ``to.format``, in its own dtype."""
    x, coded = source.array, source.coded
    if coded is None and x.dtype == np.float16:
        x, coded = x.view(np.uint16), _FP16.name
    rounded = np.empty(x.shape, x.dtype)
    for part, out, start in _parts(x, rounded):
        _cast_part(_numbers(part, coded), to, out, coded, start, seed)
    return rounded.view(source.array.dtype)


def _cast_part(x: np.ndarray, to: Encoding, out: np.ndarray, coded: str | None, start: int, seed: int) -> None:
    """Round one piece of numbers, and write them as they are or as codes of the format ``coded``."""
    format, rules, dtype, special = to
    single = special is None and x.dtype == _SINGLE and coded is None
    if single and not isinstance(format, Codebook) and by_table(format, rules):
        _check_nan(x, format, rules, start)
        engine().values_by_half(x, casting_table(format, rules), out)
        return
    codes = np.empty(x.shape, dtype)
    _encode_part(x, to, codes, start, seed)
    if coded is None:
        decode_part(codes, format, out)
        return
    values = decode(codes, format, "float32" if exact_in_float32(format) else "float64")
    encode_part(values, ELEMENTS[coded], Rules.of(ELEMENTS[coded]), out, start, 0)


def _parts(x: np.ndarray, out: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """Cut two arrays of the same shape into contiguous pieces: (piece, place for the result, position)."""
    flat, flat_out = np.ascontiguousarray(x).reshape(-1), out.reshape(-1)
    length = _PIECE if engine().COMPILED else engine().CHUNK
    for start in range(0, flat.size, length):
        yield flat[start : start + length], flat_out[start : start + length], start

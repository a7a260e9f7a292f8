"""encode, decode and cast on NumPy arrays: each piece of an array by the quickest way that is exact.

Arrays are cut so that what is worked on stays in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache

import numpy as np

from narrowcast.errors import FormatError
from narrowcast.formats.arrays import Opened, code_dtype
from narrowcast.formats.codebooks import codebook_codes, codebook_edges
from narrowcast.formats.engine import engine
from narrowcast.formats.kinds import Codebook, ElementFormat, Format, Integer
from narrowcast.formats.native import decode_natively, encode_natively
from narrowcast.formats.portable import SpecialCodes
from narrowcast.formats.rules import NanInput, Overflow, Rounding, Rules
from narrowcast.formats.table import ELEMENTS
from narrowcast.formats.tables import (
    by_arithmetic,
    by_table,
    casting_table,
    decode_exactly,
    encode_exactly,
    encoding_table,
    exact_in_float32,
    special_codes,
    values_of,
)

__all__ = ["by_rint", "cast", "codebook_edges", "decode", "encode", "encode_part", "exact_in_float32"]

_LONG = 1 << 22  # elements of a piece for a compiled loop that passes over them once: the cache plays no part


def encode(source: Opened, format: ElementFormat, rules: Rules, seed: int) -> np.ndarray:
    """Return the codes of ``source``, in its shape."""
    x = source.array
    codes = np.empty(x.shape, code_dtype(format.bits))
    by_arithmetic = None if source.coded is not None else _arithmetic(x.dtype, format, rules)
    if by_arithmetic is not None:
        for part, out, start in _parts(x, codes, one_pass=True):
            _check_nan(part, format, rules, start)
            by_arithmetic(part, out)
        return codes
    for part, out, start in _parts(x, codes):
        numbers = part if source.coded is None else decode(part, ELEMENTS[source.coded], "float32")
        encode_part(numbers, format, rules, out, start, seed)
    return codes


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
    if x.dtype == np.float16:
        x = x.astype(np.float32)
    _check_nan(x, format, rules, start)
    if isinstance(format, Codebook):
        out[...] = codebook_codes(_without_nan(x, format, rules), format, rules, start, seed)
    elif isinstance(format, Integer) and by_rint(format, rules):
        _encode_by_rint(x, format, out)
    elif by_arithmetic := _arithmetic(x.dtype, format, rules):
        by_arithmetic(x, out)
    elif x.dtype == np.float32 and by_table(format, rules):
        engine().codes_by_half(x, encoding_table(format, rules), out)
    else:
        out[...] = encode_exactly(x, format, rules, start, seed)


@lru_cache(maxsize=64)
def _arithmetic(
    dtype: np.dtype, format: ElementFormat, rules: Rules
) -> Callable[[np.ndarray, np.ndarray], None] | None:
    """Return the loop that writes the codes of numbers of a dtype in one pass, where the rules are those of arithmetic."""
    fits = dtype == np.float32 and rules.rounding is Rounding.NEAREST_EVEN and by_arithmetic(format)
    if not fits or not isinstance(format, Format):
        return None
    special = special_codes(format, rules)
    return lambda x, out: _encode_by_arithmetic(x, format, special, out)


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
    one_pass = dtype == "float32" and by_arithmetic(format)
    for part, out, _ in _parts(codes, values, one_pass=one_pass):
        if one_pass and isinstance(format, Format) and _decode_by_arithmetic(part, format, out):
            continue
        if format.bits <= 16:
            engine().decoded(part, values_of(format, dtype), out)
        else:
            out[...] = decode_exactly(part, format)
    return values


def _decode_by_arithmetic(codes: np.ndarray, format: Format, out: np.ndarray) -> bool:
    if not engine().COMPILED and decode_natively(codes, format, out):
        return True
    return engine().decoded_floats(codes, format, out)


def cast(source: Opened, format: ElementFormat, rules: Rules, seed: int) -> np.ndarray:
    """Return ``source`` rounded to the format's numbers, in its own dtype."""
    x = source.array
    if source.coded is not None:
        own = ELEMENTS[source.coded]
        values = decode(encode(source, format, rules, seed), format, "float64")
        codes = np.empty(x.shape, x.dtype)
        for part, out, start in _parts(values, codes):
            encode_part(part, own, Rules.of(own), out, start, 0)
        return codes
    rounded = np.empty(x.shape, x.dtype)
    for part, out, start in _parts(x, rounded):
        if x.dtype == np.float32 and not isinstance(format, Codebook) and by_table(format, rules):
            _check_nan(part, format, rules, start)
            engine().values_by_half(part, casting_table(format, rules), out)
        else:
            codes = np.empty(part.shape, code_dtype(format.bits))
            encode_part(part, format, rules, codes, start, seed)
            with np.errstate(over="ignore"):  # a float16 array cannot hold every number of a wide format
                out[...] = decode(codes, format, "float64")
    return rounded


def _parts(x: np.ndarray, out: np.ndarray, *, one_pass: bool = False) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """Cut two arrays of the same shape into contiguous pieces: (piece, place for the result, position)."""
    flat, flat_out = np.ascontiguousarray(x).reshape(-1), out.reshape(-1)
    chunk = _LONG if one_pass and engine().COMPILED else engine().CHUNK
    for start in range(0, flat.size, chunk):
        yield flat[start : start + chunk], flat_out[start : start + chunk], start

"""The codecs on NumPy arrays, at the speed of table look-ups.

A float32 number and a narrow format: the upper 16 bits, with the lowest of them set if anything follows, decide the code,
because no rounding boundary of a format with few significand bits has a digit further down. So every rounding, overflow
and NaN rule is one table of 65,536 codes, built by the exact codec of ``bits``. Arrays are cut so that what is worked on
stays in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from narrowcast.errors import FormatError
from narrowcast.formats import bits
from narrowcast.formats.arrays import Opened, code_dtype
from narrowcast.formats.kinds import Codebook, ElementFormat, Format, Integer
from narrowcast.formats.rules import NanInput, Overflow, Rounding, Rules
from narrowcast.formats.table import ELEMENTS

__all__ = ["cast", "codebook_edges", "decode", "encode", "exact_in_float32"]

CHUNK = 1 << 15
_DIGITS_OF_A_TABLE = 7  # significant bits of the upper half of a float32, less one for "something follows"


def exact_in_float32(format: ElementFormat) -> bool:
    """Return whether float32 holds every value of the format."""
    match format:
        case Codebook():
            return all(float(np.float32(value)) == value for value in format.values)
        case Integer():
            return format.fraction_bits <= 64
        case Format():
            lowest = format.minimum_exponent - format.mantissa_bits
            return format.mantissa_bits <= 23 and lowest >= -149 and format.maximum_exponent <= 127


def encode(source: Opened, format: ElementFormat, rules: Rules, seed: int) -> np.ndarray:
    """Return the codes of ``source``, in its shape."""
    x = source.array
    codes = np.empty(x.shape, code_dtype(format.bits))
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
    _check_nan(x, format, rules, start)
    if isinstance(format, Codebook):
        out[...] = _codebook_codes(x, format, rules, start, seed)
    elif x.dtype == np.float32 and _by_table(format, rules):
        np.take(_encoding_table(format, rules), upper_half(x), out=out, mode="clip")
    elif isinstance(format, Integer) and _by_rint(format, rules):
        steps = np.rint(x * format.step**-1) if format.fraction_bits else np.rint(x)
        np.clip(steps, format.min / format.step, format.max / format.step, out=steps)
        out[...] = steps.astype(np.int32)
        out &= (1 << format.bits) - 1
    elif (
        x.dtype == np.float32
        and isinstance(format, Format)
        and format == ELEMENTS["bf16"]
        and rules.rounding is Rounding.NEAREST_EVEN
    ):
        _encode_bf16(x, format, rules, out, start)
    else:
        out[...] = _encode_exactly(x, format, rules, start, seed)


def _check_nan(x: np.ndarray, format: ElementFormat, rules: Rules, start: int) -> None:
    if (isinstance(format, Format) and format.has_nan) or rules.nan is not NanInput.ERROR:
        return
    nan = np.isnan(x)
    if nan.any():
        raise FormatError(
            f"NaN at position {start + int(nan.argmax())}, and {format.name} has none",
            allowed="numbers and infinities",
            next_step="give nan='zero' or nan='max'",
        )


def upper_half(x: np.ndarray) -> np.ndarray:
    """Return the upper 16 bits of float32 numbers, the lowest of them set if any lower bit is: shape [n], uint16."""
    halves = x.view(np.uint16).reshape(-1, 2)
    return halves[:, 1] | (halves[:, 0] != 0)


def _by_table(format: Format | Integer, rules: Rules) -> bool:
    digits = format.mantissa_bits + 1 if isinstance(format, Format) else format.bits - format.signed
    return (
        digits + 1 <= _DIGITS_OF_A_TABLE
        and rules.rounding is not Rounding.STOCHASTIC
        and rules.overflow is not Overflow.WRAP  # which looks at the lowest digits
    )


def _by_rint(format: Integer, rules: Rules) -> bool:
    return (
        rules.rounding is Rounding.NEAREST_EVEN and rules.overflow is not Overflow.WRAP and rules.nan is NanInput.ERROR
    )


@lru_cache(maxsize=64)
def _encoding_table(format: Format | Integer, rules: Rules) -> np.ndarray:
    halves = np.arange(1 << 16, dtype=np.uint32) << 16
    with np.errstate(invalid="ignore"):
        numbers = halves.view(np.float32).astype(np.float64)
    return _encode_exactly(numbers, format, rules, 0, 0).astype(code_dtype(format.bits))


@lru_cache(maxsize=64)
def _casting_table(format: Format | Integer, rules: Rules) -> np.ndarray:
    return decode(_encoding_table(format, rules), format, "float32")


def _encode_bf16(x: np.ndarray, format: Format, rules: Rules, out: np.ndarray, start: int) -> None:
    word = x.view(np.uint32)
    special = (word & 0x7FFFFFFF) > 0x7F7F7FFF  # rounds beyond the largest number, infinite, or NaN
    out[...] = (word + (0x7FFF + ((word >> 16) & 1))) >> 16
    if special.any():
        out[special] = _encode_exactly(x[special], format, rules, start, 0)


def _encode_exactly(x: np.ndarray, format: Format | Integer, rules: Rules, start: int, seed: int) -> np.ndarray:
    word = x.astype(np.float64, copy=False).view(np.int64)
    places = np.arange(start, start + x.size) if rules.rounding is Rounding.STOCHASTIC else word
    encoder = bits.encode_float if isinstance(format, Format) else bits.encode_integer
    return encoder(word, format, rules, np.where, places, seed)  # type: ignore[arg-type]


@lru_cache(maxsize=64)
def codebook_edges(format: Codebook, dtype: str) -> np.ndarray:
    """Return the numbers above which a code is the next one: midpoints, rounded down to ``dtype``, shape [n - 1].

    A number of that dtype is above the midpoint exactly if it is above the midpoint rounded down.
    """
    values = np.array(format.values)
    exact = values[:-1] + (values[1:] - values[:-1]) / 2
    edges = exact.astype(dtype)
    return np.where(edges.astype(np.float64) > exact, np.nextafter(edges, edges.dtype.type(-np.inf)), edges)


def _codebook_codes(x: np.ndarray, format: Codebook, rules: Rules, start: int, seed: int) -> np.ndarray:
    if rules.rounding is Rounding.NEAREST_EVEN and len(format.values) <= 32:
        codes = np.zeros(x.shape, np.uint8)
        for edge in codebook_edges(format, x.dtype.name):
            codes += x > edge
        return codes
    values = np.array(format.values)
    x = x.astype(np.float64, copy=False)
    lower = np.clip(np.searchsorted(values, x, side="right") - 1, 0, len(values) - 2)
    rest, gap = x - values[lower], values[lower + 1] - values[lower]
    match rules.rounding:
        case Rounding.NEAREST_EVEN:
            up = rest > gap / 2
        case Rounding.NEAREST_AWAY:
            up = (rest > gap / 2) | ((rest == gap / 2) & (x > 0))
        case Rounding.TOWARD_ZERO:
            up = (rest > 0) & (x < 0)
        case Rounding.UP:
            up = rest > 0
        case Rounding.DOWN:
            up = rest >= gap
        case Rounding.TO_ODD:
            up = (rest >= gap) | ((rest > 0) & (lower % 2 == 0))
        case Rounding.STOCHASTIC:
            draw, _ = bits.random_words(np.arange(start, start + x.size), seed)
            up = rest / gap > draw * 2.0**-62
    return np.clip(lower + (up | (rest >= gap)), 0, len(values) - 1)


def decode(codes: np.ndarray, format: ElementFormat, dtype: str) -> np.ndarray:
    """Return the values of unsigned codes in ``dtype``, which must hold them exactly."""
    if format.bits > 16:
        values = np.empty(codes.shape, dtype)
        for part, out, _ in _parts(codes, values):
            out[...] = _decode_exactly(part, format)
        return values
    values = np.empty(codes.shape, dtype)
    for part, out, _ in _parts(codes, values):
        if format.bits <= 8 and part.size % 2 == 0:
            pairs = _pair_table(format, dtype)
            np.take(pairs, part.view(np.uint16), out=out.view(pairs.dtype), mode="clip")
        else:
            np.take(_decoding_table(format, dtype), part, out=out, mode="clip")
    return values


@lru_cache(maxsize=64)
def _decoding_table(format: ElementFormat, dtype: str) -> np.ndarray:
    values = _decode_exactly(np.arange(1 << format.bits), format)
    with np.errstate(invalid="ignore"):  # a signalling NaN becomes quiet in float32
        return values.astype(dtype)


@lru_cache(maxsize=32)
def _pair_table(format: ElementFormat, dtype: str) -> np.ndarray:
    """Return, for two codes as one 16-bit number, both values as one complex number: half as many look-ups."""
    table = _decoding_table(format, dtype)
    single = np.resize(table, 256)  # codes above the format's are never looked up
    both = np.arange(1 << 16)
    first, second = (both & 0xFF, both >> 8) if np.little_endian else (both >> 8, both & 0xFF)
    pairs = np.empty((1 << 16, 2), dtype)
    pairs[:, 0], pairs[:, 1] = single[first], single[second]
    return pairs.view(np.dtype(f"complex{16 * pairs.itemsize}"))[:, 0]


def decode_nibbles(packed: np.ndarray, format: ElementFormat, out: np.ndarray) -> None:
    """Write the values of 4-bit codes, two a byte with the first one low, into ``out``: shape [2 * bytes]."""
    both = packed.view("<u2")
    table = _nibble_table(format, out.dtype.name)
    np.take(table, both, out=out.view(table.dtype), mode="clip")


@lru_cache(maxsize=16)
def _nibble_table(format: ElementFormat, dtype: str) -> np.ndarray:
    """Return the four values of every two bytes, as one item of four times ``dtype``'s size: shape [65536]."""
    both = np.arange(1 << 16)
    values = np.stack([_decoding_table(format, dtype)[both >> shift & 15] for shift in (0, 4, 8, 12)], axis=1)
    wide = np.dtype("complex128") if dtype == "float32" else np.dtype("V32")
    return np.ascontiguousarray(values).view(wide)[:, 0]


def _decode_exactly(codes: np.ndarray, format: ElementFormat) -> np.ndarray:
    whole = codes.astype(np.int64)
    match format:
        case Codebook():
            return np.array(format.values)[np.minimum(whole, len(format.values) - 1)]
        case Integer():
            return bits.decode_integer(whole, format, np.where) * format.step
        case Format():
            return bits.decode_float(whole, format, np.where).view(np.float64)


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
        if x.dtype == np.float32 and not isinstance(format, Codebook) and _by_table(format, rules):
            _check_nan(part, format, rules, start)
            np.take(_casting_table(format, rules), upper_half(part), out=out, mode="clip")
        else:
            codes = np.empty(part.shape, code_dtype(format.bits))
            encode_part(part, format, rules, codes, start, seed)
            with np.errstate(over="ignore"):  # a float16 array cannot hold every number of a wide format
                out[...] = decode(codes, format, "float64")
    return rounded


def _parts(x: np.ndarray, out: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """Cut two arrays of the same shape into contiguous pieces: (piece, place for the result, position)."""
    flat, flat_out = np.ascontiguousarray(x).reshape(-1), out.reshape(-1)
    for start in range(0, flat.size, CHUNK):
        yield flat[start : start + CHUNK], flat_out[start : start + CHUNK], start

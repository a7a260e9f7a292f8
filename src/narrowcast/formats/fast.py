"""encode, decode and cast on NumPy arrays: each piece of an array by the quickest way that is exact.

Compiled loops pass over a whole array once where one of them does it all; else arrays are cut so that what is worked on
stays in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from narrowcast.errors import FormatError
from narrowcast.formats.arrays import CODED, Opened, code_dtype
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
    exponent_codes,
    is_exponent,
    narrows_first,
    special_codes,
    values_of,
)

__all__ = [
    "Decoding",
    "Encoding",
    "by_rint",
    "cast",
    "codebook_edges",
    "decode",
    "decode_part",
    "decoded",
    "encode",
    "encode_part",
    "exact_in_float32",
]

_PIECE = 1 << 16  # elements that compiled loops pass on to each other: they stay in the cache
_SINGLE = np.dtype(np.float32)
_FP16, _FP32 = ELEMENTS["fp16"], ELEMENTS["fp32"]
_WIDE: dict[ElementFormat, type[np.floating]] = {ELEMENTS["fp32"]: np.float32, ELEMENTS["fp64"]: np.float64}
_OWN = {np.dtype(dtype): name for name, dtype in (("fp16", "f2"), ("fp32", "f4"), ("fp64", "f8"))}
_DTYPES = (*_OWN.values(), *CODED.values())  # names of the formats that arrays come in

Loop = Callable[[np.ndarray, np.ndarray], None]  # from a flat array to another one


class Encoding(NamedTuple):
    """A format and rules with what follows from them, worked out once: a call on a few numbers is short.

    Args:
        format: What to encode to.
        rules: What to do where the format gives a choice.
        dtype: Of the codes.
        special: Of the arithmetic that encodes float32 numbers; None where the rules are not its own.
        loop: Writes the codes of float32 numbers in one pass; None without such a compiled loop, or where NaN is refused.
        wide: Writes the codes of float64 numbers in one pass, as ``loop`` does; FP32 alone has such a loop.
        casting: Writes what float32 numbers are rounded to in one pass; None without such a compiled loop.
        holds: Names of the formats whose numbers these rules leave as they are: those of dtypes that the format contains.
    """

    format: ElementFormat
    rules: Rules
    dtype: np.dtype[Any]
    special: SpecialCodes | None
    loop: Loop | None
    wide: Loop | None
    casting: Loop | None
    holds: frozenset[str]

    @staticmethod
    @lru_cache(maxsize=256)
    def of(format: ElementFormat, rules: Rules) -> Encoding:
        """Return what the two come to."""
        special, loop, casting = None, None, None
        if isinstance(format, Format):
            if rules.rounding is Rounding.NEAREST_EVEN and by_arithmetic(format):
                special = special_codes(format, rules)
            if engine().COMPILED and not _refuses_nan(format, rules):
                loop, casting = _loops(format, rules, special)
        wide = _narrowed if engine().COMPILED and _is_conversion(format, rules) else None
        return Encoding(
            format, rules, np.dtype(code_dtype(format.bits)), special, loop, wide, casting, _held(format, rules)
        )


def _held(format: ElementFormat, rules: Rules) -> frozenset[str]:
    """Return the names of :attr:`Encoding.holds`."""
    if isinstance(format, Format) and format.has_inf and rules.overflow not in (Overflow.IEEE, Overflow.SATURATE):
        return frozenset()  # infinity becomes something else
    held = {name for name in _DTYPES if ELEMENTS[name] == format}
    if format == ELEMENTS["fp64"] or format == ELEMENTS["fp32"]:
        held |= {name for name in _DTYPES if format == ELEMENTS["fp64"] or exact_in_float32(ELEMENTS[name])}
    return frozenset(held)


def _loops(format: Format, rules: Rules, special: SpecialCodes | None) -> tuple[Loop | None, Loop | None]:
    """Return the compiled loops that encode and cast float32 numbers in one pass."""
    from narrowcast.formats import compiled

    if special is not None:
        return compiled.nearest_loop(format, special), compiled.casting_loop(format, special)
    if is_exponent(format):
        codes = exponent_codes(format, rules)
        return None if codes is None else compiled.exponent_loop(codes), None
    return None, None


class Decoding(NamedTuple):
    """A format and the dtype of its values, worked out once.

    Args:
        format: Of the codes.
        dtype: Of the values.
        loop: Writes the values of codes in one pass; None without such a compiled loop.
    """

    format: ElementFormat
    dtype: np.dtype[Any]
    loop: Loop | None

    @staticmethod
    @lru_cache(maxsize=256)
    def of(format: ElementFormat, dtype: str) -> Decoding:
        """Return what the two come to."""
        return Decoding(format, np.dtype(dtype), _decoding_loop(format, dtype) if engine().COMPILED else None)


def _decoding_loop(format: ElementFormat, dtype: str) -> Loop | None:
    from narrowcast.formats import compiled

    if isinstance(format, Format) and (decoded_by_arithmetic(format) or is_exponent(format)):
        return compiled.decoding_loop(format)
    if isinstance(format, Format) and format in _WIDE:
        return lambda codes, out: _widened(codes, format, out)
    if format.bits > 16:
        return None
    values = values_of(format, dtype)
    return lambda codes, out: compiled.decoded(codes, values, out)


def encode(source: Opened, to: Encoding, seed: int) -> np.ndarray:
    """Return the codes of ``source``, in its shape."""
    x = source.array
    if to.loop is not None and x.dtype == _SINGLE:
        codes = np.empty(x.shape, to.dtype)
        to.loop(x.reshape(-1), codes.reshape(-1))  # one pass: the cache plays no part
        return codes
    own = source.coded or _OWN[x.dtype]
    if own in to.holds:
        return _kept(x, ELEMENTS[own], to)
    codes = np.empty(x.shape, to.dtype)
    if to.wide is not None and own == "fp64":
        to.wide(x.reshape(-1), codes.reshape(-1))
        return codes
    for part, out, start in _parts(x, codes):
        _encode_part(_numbers(part, source.coded), to, out, start, seed)
    return codes


def _kept(x: np.ndarray, own: ElementFormat, to: Encoding) -> np.ndarray:
    """Return the codes of numbers of the format ``own``, which ``to`` holds: nothing is rounded."""
    codes = x.view(code_dtype(8 * x.itemsize))
    if own != to.format:
        return decode(codes, own, _WIDE[to.format].__name__).view(to.dtype)
    out = np.empty(x.shape, to.dtype)
    if isinstance(own, Format) and own.has_inf:
        engine().quieted(codes.reshape(-1), own, out.reshape(-1))
    else:
        np.copyto(out, codes)
    return out


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
    format, rules, special = to.format, to.rules, to.special
    if x.dtype == np.float16:
        x = decode(x.view(np.uint16), _FP16, "float32")
    if to.loop is not None and (x.dtype == _SINGLE or special is not None or narrows_first(format, rules)):
        to.loop(x if x.dtype == _SINGLE else engine().narrowed_to_odd(x), out)
        return
    _check_nan(x, format, rules, start)
    if special is not None and isinstance(format, Format):
        single = x if x.dtype == _SINGLE else engine().narrowed_to_odd(x)
        _encode_by_arithmetic(single, format, special, out)
    elif isinstance(format, Codebook):
        out[...] = codebook_codes(_without_nan(x, format, rules), format, rules, start, seed)
    elif isinstance(format, Integer) and by_rint(format, rules):
        _encode_by_rint(x, format, out)
    elif by_table(format, rules) and (x.dtype == _SINGLE or narrows_first(format, rules)):
        single = x if x.dtype == _SINGLE else engine().narrowed_to_odd(x)
        engine().codes_by_half(single, encoding_table(format, rules), out)
    elif _is_conversion(format, rules):
        _narrowed(x, out)
    else:
        out[...] = encode_exactly(x, format, rules, start, seed)


def _is_conversion(format: ElementFormat, rules: Rules) -> bool:
    """Return whether encoding a float64 is what a processor does to make it a float32."""
    return format == _FP32 and (rules.rounding, rules.overflow) == (Rounding.NEAREST_EVEN, Overflow.IEEE)


def _narrowed(x: np.ndarray, out: np.ndarray) -> None:
    """Write the codes in FP32 of float64 numbers; float32 ones are held and do not come here."""
    engine().converted(x, out.view(_SINGLE))


def _refuses_nan(format: ElementFormat, rules: Rules) -> bool:
    return not (isinstance(format, Format) and format.has_nan) and rules.nan is NanInput.ERROR


def _check_nan(x: np.ndarray, format: ElementFormat, rules: Rules, start: int) -> None:
    if not _refuses_nan(format, rules):
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
    step, zero = np.array([format.step], x.dtype), np.zeros(1, np.int32)
    lowest, highest = round(format.min / format.step), round(format.max / format.step)
    with np.errstate(over="ignore"):  # infinity is clamped like any other number
        engine().rounded_steps(x[None], step, zero, lowest, highest, (1 << format.bits) - 1, out[None])


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
    return decoded(codes, Decoding.of(format, dtype))


def decoded(codes: np.ndarray, to: Decoding) -> np.ndarray:
    """As :func:`decode`."""
    values = np.empty(codes.shape, to.dtype)
    if to.loop is not None:
        to.loop(codes.reshape(-1), values.reshape(-1))  # one pass: the cache plays no part
        return values
    for part, out, _ in _parts(codes, values):
        _decode_part(part, to.format, out)
    return values


def decode_part(codes: np.ndarray, format: ElementFormat, out: np.ndarray) -> None:
    """Write the values of one contiguous piece of codes as float32 or float64."""
    loop = Decoding.of(format, out.dtype.name).loop
    if loop is not None:
        loop(codes, out)
    else:
        _decode_part(codes, format, out)


def _decode_part(codes: np.ndarray, format: ElementFormat, out: np.ndarray) -> None:
    if decoded_by_arithmetic(format) and isinstance(format, Format) and engine().decoded_floats(codes, format, out):
        return
    if isinstance(format, Format) and format in _WIDE:
        _widened(codes, format, out)
    elif format.bits <= 16:
        engine().decoded(codes, values_of(format, out.dtype.name), out)
    else:
        with np.errstate(over="ignore"):
            out[...] = decode_exactly(codes, format)


def _widened(codes: np.ndarray, format: Format, out: np.ndarray) -> None:
    """Write the numbers of FP32 or FP64, given as codes, as float32 or float64; a NaN is quiet."""
    own = _WIDE[format]
    if out.dtype == own:
        engine().quieted(codes, format, out.view(codes.dtype))
    else:
        engine().converted(codes.view(own), out)


def cast(source: Opened, to: Encoding, seed: int) -> np.ndarray:
    """Return ``source`` rounded to the numbers of ``to.format``, in its own dtype."""
    x, coded = source.array, source.coded
    own = coded or _OWN[x.dtype]
    if own in to.holds:
        return _kept(x, ELEMENTS[own], Encoding.of(ELEMENTS[own], Rules.of(ELEMENTS[own]))).view(x.dtype)
    rounded = np.empty(x.shape, x.dtype)
    if to.casting is not None and x.dtype == _SINGLE:
        to.casting(x.reshape(-1), rounded.reshape(-1))  # one pass: the cache plays no part
        return rounded
    if coded is None and x.dtype == np.float16:
        x, coded = x.view(np.uint16), _FP16.name
        rounded = rounded.view(np.uint16)
    for part, out, start in _parts(x, rounded):
        _cast_part(_numbers(part, coded), to, out, coded, start, seed)
    return rounded.view(source.array.dtype)


def _cast_part(x: np.ndarray, to: Encoding, out: np.ndarray, coded: str | None, start: int, seed: int) -> None:
    """Round one piece of numbers, and write them as they are or as codes of the format ``coded``."""
    format, rules = to.format, to.rules
    single = to.special is None and x.dtype == _SINGLE and coded is None
    if single and not isinstance(format, Codebook) and by_table(format, rules):
        _check_nan(x, format, rules, start)
        engine().values_by_half(x, casting_table(format, rules), out)
        return
    codes = np.empty(x.shape, to.dtype)
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

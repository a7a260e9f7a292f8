"""encode, decode and cast: between numbers and the codes of a format, rounded once, bit for bit."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from narrowcast.errors import FormatError
from narrowcast.formats import device, fast
from narrowcast.formats.arrays import Array, on_device, opened, opened_codes
from narrowcast.formats.blocks import BlockFormat
from narrowcast.formats.checks import check_words, whole
from narrowcast.formats.kinds import ElementFormat
from narrowcast.formats.native import torch_codes
from narrowcast.formats.rules import CHOICES, Rules
from narrowcast.formats.table import element

__all__ = ["cast", "decode", "encode"]

FormatLike = str | ElementFormat | BlockFormat


def encode(
    x: Any,
    format: FormatLike,
    *,
    rounding: str | None = None,
    overflow: str | None = None,
    nan: str | None = None,
    below: str | None = None,
    convention: str | None = None,
    seed: int = 0,
) -> Array:
    """Return the codes of ``x``: unsigned integers of ``x``'s shape, on its device.

    Every input is rounded once, float64 too.

    Args:
        x: Numbers: a NumPy array, a torch tensor on any device, or Python numbers. Any shape, also empty.
        format: Name, alias or format object.
        rounding: ``nearest_even`` (the default), ``nearest_away``, ``toward_zero``, ``up``, ``down``, ``to_odd`` or
            ``stochastic``.
        overflow: ``ieee`` (the default where the format has infinities), ``saturate`` (the default elsewhere; infinity
            stays what it is where the format has it or NaN), ``clamp`` (infinity becomes the largest number too),
            ``nan``, or ``wrap`` (integers only).
        nan: What NaN becomes in a format without it: ``error`` (the default), ``zero`` or ``max``.
        below: What zero and negative numbers become in E8M0, and negative ones in other unsigned floats: ``nan``,
            ``magnitude`` or ``clamp``.
        convention: ``onnx``, ``torch``, ``ml_dtypes`` or ``cuda``: that system's choices, under those named beside it.
        seed: Of stochastic rounding. The same seed gives the same codes on every device, however the array is cut.

    Returns:
        uint8, uint16, uint32 or uint64 codes, the smallest that hold ``format.bits``.

    Raises:
        FormatError: An unknown name, a dtype that is no real number, or NaN without a place to go.
    """
    to, seed = _resolved(format, rounding, overflow, nan, below, convention), whole("seed", seed)
    if convention == "torch" and (rounding, overflow, nan, below) == (None, None, None, None):
        codes = torch_codes(x, to.format)
        if codes is not None:
            return codes
    if on_device(x):
        return device.encode(x, to.format, to.rules, seed)
    source = opened(x)
    return source.back(fast.encode(source, to, seed))


def _key(format: FormatLike) -> str | ElementFormat:
    """Return what the kept answers are looked up by: a name as it was given, else an element format."""
    return format if isinstance(format, str) else element(format)


def _resolved(format: FormatLike, *choices: str | None) -> fast.Encoding:
    """Return what a format and the choices for :meth:`Rules.of` come to."""
    try:
        return _encoding(_key(format), *choices)
    except TypeError:  # nothing is kept under a list
        check_words(dict(zip(CHOICES, choices, strict=True)))
        raise


@lru_cache(maxsize=256)
def _encoding(format: str | ElementFormat, *choices: str | None) -> fast.Encoding:
    """Return what a format and the choices for :meth:`Rules.of` come to."""
    to = element(format)
    return fast.Encoding.of(to, Rules.of(to, *choices))


def decode(codes: Any, format: FormatLike, *, dtype: str = "float64") -> Array:
    """Return the exact values of codes.

    Args:
        codes: Whole numbers of ``format.bits`` bits: a NumPy array, or a torch tensor on any device.
        format: Name, alias or format object.
        dtype: ``float64``, or ``float32`` for a format whose values float32 holds exactly.

    Raises:
        FormatError: A code out of range, or float32 asked for where it is not exact.
    """
    if not isinstance(dtype, str) or dtype not in ("float64", "float32"):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise FormatError(f"dtype = {dtype!r:.100}", allowed="float64, float32")
    to = _decoding(_key(format), dtype)
    if on_device(codes):
        return device.decode(codes, to.format, dtype)
    source = opened_codes(codes, to.format.bits, to.format.last_code)
    return source.back(fast.decoded(source.array, to))


@lru_cache(maxsize=256)
def _decoding(format: str | ElementFormat, dtype: str) -> fast.Decoding:
    """Return what a format and the dtype of its values come to, if that dtype holds them."""
    source_format = element(format)
    if dtype == "float32" and not fast.exact_in_float32(source_format):
        raise FormatError(
            f"{source_format.name} in float32 would be rounded",
            allowed="dtype='float64'",
            next_step="or decode and cast",
        )
    return fast.Decoding.of(source_format, dtype)


def cast(
    x: Any,
    format: FormatLike,
    *,
    rounding: str | None = None,
    overflow: str | None = None,
    nan: str | None = None,
    below: str | None = None,
    convention: str | None = None,
    seed: int = 0,
) -> Array:
    """Return ``x`` rounded to the numbers of a format, in ``x``'s own dtype: ``decode(encode(x))`` without the codes.

    Takes what :func:`encode` takes. Whole numbers come back as float64.

    Raises:
        FormatError: As :func:`encode`.
    """
    to, seed = _resolved(format, rounding, overflow, nan, below, convention), whole("seed", seed)
    if on_device(x):
        return device.cast(x, to.format, to.rules, seed)
    source = opened(x)
    rounded = fast.cast(source, to, seed)
    return source.back(rounded) if source.coded is None else source.back_as_coded(rounded)

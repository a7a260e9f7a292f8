"""The codecs on torch tensors outside main memory, bit for bit what they give inside it.

Every format and rule runs on the device as torch operations on int64, the text of ``bits``: exact, and bounded by
arithmetic. What the Triton kernels know (``triton_codec``, ``triton_quantize`` and ``triton_dequantize``) goes to them; they
are bounded by memory. The device must compute in float64, as CUDA's do.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from narrowcast.errors import FormatError
from narrowcast.formats import bits, fast
from narrowcast.formats.arrays import (
    CODED,
    EXACT_WHOLE,
    FLOATS,
    WHOLE,
    Opened,
    code_dtype,
    dtype_name,
    refused,
    torch_loaded,
)
from narrowcast.formats.kinds import Codebook, ElementFormat, Format
from narrowcast.formats.rows import Rows
from narrowcast.formats.rules import NanInput, Rounding, Rules
from narrowcast.formats.scheme import Scheme
from narrowcast.formats.table import ELEMENTS

__all__ = ["Packed", "cast", "decode", "dequantize", "encode", "quantize"]

Tensor = Any  # torch.Tensor

_CHUNK = 1 << 22  # elements at a time: some twenty int64 temporaries of them live at once
_TABLE_BITS = 16  # codes of up to so many bits are decoded by table
_INFINITY = 0x7FF << 52
_MAGNITUDE = (1 << 63) - 1


class Packed(NamedTuple):
    """What a kernel made of a tensor: as :class:`~narrowcast.formats.quantized.QuantizedTensor` stores it.

    Args:
        packed: Codes without gaps, shape [bytes], uint8.
        scales: float32, or codes of the scale's format in uint8; of the layout's ``scale_shape``.
        tensor_scale: 1 without one.
        broken: First row whose FP32 scale is not finite; -1 without such a row.
    """

    packed: Tensor
    scales: Tensor
    tensor_scale: float
    broken: int


def encode(x: Tensor, format: ElementFormat, rules: Rules, seed: int) -> Tensor:
    """Return codes as :func:`narrowcast.formats.encode` does: on ``x``'s device, of its shape.

    Raises:
        FormatError: As there.
    """
    kernels = _kernels(x, "triton_codec")
    if kernels is not None and kernels.takes(x, format, rules):
        codes, lost = kernels.encode(x.detach().contiguous(), format, rules)
        _check_lost(lost, format, rules)
        return codes
    return encode_exactly(x, format, rules, seed)


def decode(codes: Tensor, format: ElementFormat, dtype: str) -> Tensor:
    """Return values as :func:`narrowcast.formats.decode` does: on the codes' device, in ``dtype``.

    Raises:
        FormatError: As there.
    """
    kernels = _kernels(codes, "triton_codec")
    if kernels is not None and kernels.decodes(codes, format, dtype):
        return kernels.decode(codes.detach().contiguous(), format)
    return decode_exactly(codes, format, dtype)


def cast(x: Tensor, format: ElementFormat, rules: Rules, seed: int) -> Tensor:
    """Return rounded numbers as :func:`narrowcast.formats.cast` does: on ``x``'s device, in its dtype.

    Raises:
        FormatError: As there.
    """
    kernels = _kernels(x, "triton_codec")
    if kernels is not None and kernels.casts(x, format, rules):
        values, lost = kernels.cast(x.detach().contiguous(), format, rules)
        _check_lost(lost, format, rules)
        return values
    return cast_exactly(x, format, rules, seed)


def quantize(x: Tensor, scheme: Scheme, layout: Rows) -> Packed | None:
    """Return ``x`` quantised by a kernel, or None where none does just that: then the way leads through main memory.

    Kernels take float32, bfloat16 and float16 whose rows lie in memory one after the other, scales from the largest
    magnitude, and elements rounded to nearest even.
    """
    kernels = _kernels(x, "triton_quantize")
    if kernels is None or not kernels.takes(x, scheme, layout):
        return None
    return Packed(*kernels.quantize(x.detach().contiguous(), scheme, layout))


def dequantize(
    packed: Tensor, scales: Tensor, scheme: Scheme, layout: Rows, tensor_scale: float, dtype: str
) -> Tensor | None:
    """Return the tensor again, of ``layout``'s shape and ``dtype``, or None where no kernel gives it.

    Any NaN that results is the device's own: its payload is not what the CPU's arithmetic gives.
    """
    kernels = _kernels(packed, "triton_dequantize")
    if kernels is None or not kernels.gives(packed, scales, scheme, layout, dtype):
        return None
    return kernels.dequantize(packed, scales, scheme, layout, tensor_scale, dtype)


def _kernels(tensor: Tensor, module: str) -> Any:
    """Return the module of kernels, imported here because Triton need not be there."""
    if tensor.device.type != "cuda" or not _has_triton():
        return None
    return importlib.import_module(f"narrowcast.formats.{module}")


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    # Only NVIDIA's compiler was checked to keep subnormal numbers and to divide as IEEE 754 says.
    return torch_loaded().version.cuda is not None and importlib.util.find_spec("triton") is not None


def encode_exactly(x: Tensor, format: ElementFormat, rules: Rules, seed: int) -> Tensor:
    """As :func:`encode`, without kernels."""
    torch, source = torch_loaded(), _opened(x)
    codes = _empty(source.array, code_dtype(format.bits))
    for part, out, start in _parts(source.array, codes):
        found = _encoded(_words(part, source.coded), format, rules, start, seed)
        out.copy_(_narrowed(found, torch, out.dtype))
    return codes


def decode_exactly(codes: Tensor, format: ElementFormat, dtype: str) -> Tensor:
    """As :func:`decode`, without kernels."""
    torch, codes = torch_loaded(), codes.detach()
    name = dtype_name(codes.dtype)
    if name not in WHOLE or name == "bool":
        raise FormatError(f"codes of dtype {name}", allowed="whole numbers", next_step="decode takes what encode gave")
    _check_codes(codes, name, format.bits)
    values = torch.empty(codes.shape, dtype=getattr(torch, dtype), device=codes.device)
    for part, out, _ in _parts(codes, values):
        whole = _unsigned(part)
        if format.bits <= _TABLE_BITS:
            torch.take(_table(format, dtype, str(codes.device)), whole, out=out)
        else:
            out.copy_(_as_numbers(_decoded(whole, format), dtype))
    return values


def cast_exactly(x: Tensor, format: ElementFormat, rules: Rules, seed: int) -> Tensor:
    """As :func:`cast`, without kernels."""
    torch, source = torch_loaded(), _opened(x)
    numbers = source.dtype if source.dtype in FLOATS else "float64"
    rounded = _empty(source.array, numbers if source.coded is None else code_dtype(8 * source.array.element_size()))
    for part, out, start in _parts(source.array, rounded):
        words = _decoded(_encoded(_words(part, source.coded), format, rules, start, seed), format)
        if source.coded is None:
            out.copy_(_as_numbers(words, numbers))
        else:
            own = ELEMENTS[source.coded]
            out.copy_(_narrowed(_encoded(words, own, Rules.of(own), start, 0), torch, out.dtype))
    return rounded if source.coded is None else rounded.view(source.own)


def _opened(x: Tensor) -> Opened:
    """Return a tensor as :func:`narrowcast.formats.arrays.opened` does, but whole numbers as they are."""
    torch, own, dtype = torch_loaded(), x.dtype, dtype_name(x.dtype)
    x = x.detach()
    if x.layout is not torch.strided:
        raise FormatError(f"a tensor of layout {x.layout}", next_step="give x.to_dense()")
    if dtype in CODED:
        return Opened(x.view(getattr(torch, code_dtype(8 * x.element_size()))), dtype, CODED[dtype], True, own)
    if dtype not in (*FLOATS, *WHOLE):
        raise refused(dtype)
    if dtype in WHOLE and x.element_size() == 8 and x.numel():
        low, high = _extremes(x)
        if max(high, -low) > EXACT_WHOLE:
            raise FormatError(f"the whole number {max(high, -low)}", allowed="up to 2**53, which float64 holds exactly")
    return Opened(x.resolve_neg(), dtype, None, True, own)


def _empty(like: Tensor, dtype: str) -> Tensor:
    torch = torch_loaded()
    return torch.empty(like.shape, dtype=getattr(torch, dtype), device=like.device)


def _parts(x: Tensor, out: Tensor) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Cut two tensors of the same shape into contiguous pieces: (piece, place for the result, position)."""
    flat, flat_out = x.reshape(-1), out.view(-1)
    for start in range(0, flat.numel(), _CHUNK):
        yield flat[start : start + _CHUNK], flat_out[start : start + _CHUNK], start


def _unsigned(x: Tensor) -> Tensor:
    """Return whole numbers as int64; unsigned ones through their signed twin, which every torch operation takes."""
    torch = torch_loaded()
    name = dtype_name(x.dtype)
    if name in ("uint16", "uint32", "uint64"):
        signed = x.view(getattr(torch, name[1:])).to(torch.int64)
        return signed if name == "uint64" else signed & ((1 << 8 * x.element_size()) - 1)
    return x.to(torch.int64)


def _narrowed(codes: Tensor, torch: Any, dtype: Any) -> Tensor:
    """Return int64 codes in an unsigned dtype."""
    if dtype is torch.uint8:
        return codes.to(dtype)
    return codes.to(getattr(torch, str(dtype).removeprefix("torch.u"))).view(dtype)  # keeps the low bits


def _extremes(x: Tensor) -> tuple[int, int]:
    """Return the lowest and the highest whole number."""
    torch = torch_loaded()
    low, high = 1 << 64, -(1 << 64)
    for part, _, _ in _parts(x, x.contiguous()):
        whole = _unsigned(part)
        beyond = whole[whole < 0] if x.dtype is torch.uint64 else whole[:0]
        if beyond.numel():
            low, high = min(low, int(beyond.min()) + (1 << 64)), max(high, int(beyond.max()) + (1 << 64))
            whole = whole[whole >= 0]
        if whole.numel():
            low, high = min(low, int(whole.min())), max(high, int(whole.max()))
    return low, high


def _check_codes(codes: Tensor, name: str, width: int) -> None:
    if codes.numel() and (name.startswith("int") or 8 * codes.element_size() > width):
        low, high = _extremes(codes)
        if low < 0 or high >> width:
            raise FormatError(f"code {low if low < 0 else high} of {width} bits", allowed=f"0 to {(1 << width) - 1}")


def _words(x: Tensor, coded: str | None) -> Tensor:
    """Return numbers (or codes of a format) as the bits of float64, in int64; a NaN keeps its payload."""
    torch = torch_loaded()
    if coded is not None:
        return torch.take(_table(ELEMENTS[coded], "float64", str(x.device)), _unsigned(x)).view(torch.int64)
    name = dtype_name(x.dtype)
    if name == "float64":
        return x.view(torch.int64)
    if name not in FLOATS:
        return _unsigned(x).to(torch.float64).view(torch.int64)
    width, fraction = (32, 23) if name == "float32" else (16, 10)
    own = x.view(getattr(torch, f"int{width}")).to(torch.int64)
    payload = (own & ((1 << fraction) - 1)) << (52 - fraction)
    lost = torch.where(own < 0, payload | (_INFINITY - (1 << 63)), payload | _INFINITY)
    return torch.where(torch.isnan(x), lost, x.to(torch.float64).view(torch.int64))


def _as_numbers(words: Tensor, dtype: str) -> Tensor:
    """Return the bits of float64 as numbers, rounded to nearest even where ``dtype`` is narrower; a NaN gets quiet."""
    torch = torch_loaded()
    if dtype == "float64":
        return words.view(torch.float64)
    own = ELEMENTS["fp32" if dtype == "float32" else "fp16"]
    codes = _encoded(words, own, Rules.of(own), 0, 0)
    return codes.to(torch.int32 if dtype == "float32" else torch.int16).view(getattr(torch, dtype))


def _encoded(words: Tensor, format: ElementFormat, rules: Rules, start: int, seed: int) -> Tensor:
    """Return the codes, in int64, of numbers given as the bits of float64."""
    torch = torch_loaded()
    if not (isinstance(format, Format) and format.has_nan) and rules.nan is NanInput.ERROR:
        lost = torch.nonzero((words & _MAGNITUDE) > _INFINITY)
        _check_lost(start + int(lost[0, 0]) if lost.numel() else -1, format, rules)
    if isinstance(format, Codebook):
        return _codebook_codes(words.view(torch.float64), format, rules, start, seed)
    stochastic = rules.rounding is Rounding.STOCHASTIC
    places = torch.arange(start, start + words.numel(), device=words.device) if stochastic else words
    encoder = bits.encode_float if isinstance(format, Format) else bits.encode_integer
    return encoder(words, format, rules, torch.where, places, seed)  # type: ignore[arg-type]


def _codebook_codes(x: Tensor, format: Codebook, rules: Rules, start: int, seed: int) -> Tensor:
    torch = torch_loaded()
    if rules.rounding is not Rounding.NEAREST_EVEN:  # rare: the CPU's own text decides
        codes = np.empty(x.numel(), code_dtype(format.bits))
        fast.encode_part(x.cpu().numpy(), format, rules, codes, start, seed)
        return torch.from_numpy(codes.astype(np.int64)).to(x.device)
    edges = torch.from_numpy(fast.codebook_edges(format, "float64")).to(x.device)
    known = torch.where(torch.isnan(x), format.max if rules.nan is NanInput.MAX else 0.0, x)
    return torch.bucketize(known, edges)


def _check_lost(place: int, format: ElementFormat, rules: Rules) -> None:
    if place >= 0:  # the CPU's text says what is wrong with it
        fast.encode_part(np.array([math.nan]), format, rules, np.empty(1, code_dtype(format.bits)), place, 0)


def _decoded(codes: Tensor, format: ElementFormat) -> Tensor:
    """Return the bits of float64, in int64, that int64 codes stand for."""
    torch = torch_loaded()
    if format.bits <= _TABLE_BITS:
        return torch.take(_table(format, "float64", str(codes.device)), codes).view(torch.int64)
    assert isinstance(format, Format)
    return bits.decode_float(codes, format, torch.where)


@lru_cache(maxsize=64)
def _table(format: ElementFormat, dtype: str, device: str) -> Tensor:
    """Return the values of all codes, on the device: shape [2**bits]."""
    codes = np.arange(1 << format.bits, dtype=code_dtype(format.bits))
    return torch_loaded().from_numpy(fast.decode(codes, format, dtype)).to(device)

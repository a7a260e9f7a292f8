"""quantize: a tensor as packed codes with scales; and the way back."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from narrowcast.errors import FormatError
from narrowcast.formats import device, fast, ranges
from narrowcast.formats.arrays import Array, on_device, opened, torch_loaded
from narrowcast.formats.blocks import BlockFormat
from narrowcast.formats.granularity import Granularity, PerBlock, Rows
from narrowcast.formats.kinds import ElementFormat
from narrowcast.formats.packing import pack_known, unpack
from narrowcast.formats.ranges import Chosen
from narrowcast.formats.rules import Overflow, Rules
from narrowcast.formats.scales import element_max
from narrowcast.formats.scheme import DOUBLE_BLOCK, Scheme
from narrowcast.formats.table import ELEMENTS

__all__ = ["QuantizedTensor", "quantize"]

_DTYPES = ("float64", "float32", "float16", "bfloat16")


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A tensor as codes packed without gaps, and what they are to be multiplied by.

    Args:
        scheme: How it was quantised.
        shape: The tensor's shape.
        dtype: Name of the tensor's dtype, which :meth:`dequantize` gives back.
        packed: Codes in the tensor's own order (and its padding, if any), shape [bytes], uint8.
        stored_scales: As they are kept: codes of ``scheme.scale`` (FP32 as itself), of shape [...] with one entry per
            channel or block; or, with double quantisation, a quantised tensor of them.
        zero_points: int32, of the scales' shape; None where zero is code zero.
        tensor_scale: FP32; 1 without one.
        scale_offset: What double quantisation took from the scales: their mean.
    """

    scheme: Scheme
    shape: tuple[int, ...]
    dtype: str
    packed: Array
    stored_scales: Array | QuantizedTensor
    zero_points: Array | None = None
    tensor_scale: float = 1.0
    scale_offset: float = 0.0

    def dequantize(self, dtype: str | None = None) -> Array:
        """Return the tensor again: element times scale, in float32 (float64 for a float64 tensor).

        Args:
            dtype: ``float64``, ``float32``, ``float16`` or ``bfloat16`` (torch alone); the tensor's own unless given.

        Raises:
            FormatError: Another dtype.
        """
        dtype = dtype or (self.dtype if self.dtype in _DTYPES else "float32")
        if dtype not in _DTYPES or (dtype == "bfloat16" and not self.is_torch):
            allowed = _DTYPES if self.is_torch else _DTYPES[:3]
            if self.dtype == dtype:
                dtype = "float32"  # an array of ml_dtypes: NumPy alone has no such dtype
            else:
                raise FormatError(f"dtype = {dtype!r}", allowed=", ".join(allowed))
        if on_device(self.packed):
            return device.dequantize(self, dtype)
        values = self._values("float64" if dtype == "float64" else "float32")
        if not self.is_torch:
            with np.errstate(over="ignore"):
                return values.astype(dtype, copy=False)
        torch = torch_loaded()
        return torch.from_numpy(values).to(getattr(torch, dtype))

    def _values(self, work: str) -> np.ndarray:
        scales = self._row_scales()
        zero_points = None if self.zero_points is None else self.rows.scales_apart(_numpy(self.zero_points))
        packed, bits = _numpy(self.packed), self.scheme.element.bits
        values = np.empty((self.rows.count, self.rows.length), work)
        if not self._in_order:
            codes = self.rows.rows_of_stored(unpack(packed, bits, values.size))
            packed = pack_known(codes.reshape(-1), bits)
        for rows, columns, start in _pieces(values.shape, aligned=True):
            out = values[rows, columns]
            stop = start + out.size
            part = packed[start * bits // 8 : -(-stop * bits // 8)]
            _decode_packed(part, self.scheme.element, out)
            if zero_points is not None:
                out -= zero_points[rows, None].astype(work)
            with np.errstate(invalid="ignore", over="ignore"):
                np.multiply(out, scales[rows, None].astype(work), out=out)
        return self.rows.without_padding(self.rows.together(values))

    @property
    def codes(self) -> Array:
        """The codes, unpacked: the tensor's shape (with its padding), uint8 or uint16."""
        codes = unpack(_numpy(self.packed), self.scheme.element.bits, self._stored_count)
        return self._like_packed(codes.reshape(self.rows.stored_shape))

    @property
    def scales(self) -> Array:
        """What each channel's or block's elements are multiplied by, tensor scale included: float32."""
        return self._like_packed(self.rows.scales_together(self._row_scales()))

    @property
    def rows(self) -> Rows:
        """How the tensor is laid out in rows that share a scale."""
        return Rows.of(self.shape, self.scheme.granularity, pad=self.scheme.pad)

    @property
    def is_torch(self) -> bool:
        """Whether the tensor came from torch, and goes back to it."""
        return not isinstance(self.packed, np.ndarray)

    @property
    def nbytes(self) -> int:
        """Bytes that are stored: codes, padding, scales, zero points and the tensor's own scale and offset."""
        scales = self.stored_scales
        total = _nbytes(self.packed) + (scales.nbytes if isinstance(scales, QuantizedTensor) else _nbytes(scales))
        if self.zero_points is not None:  # one code each: that is all that a file needs
            total += -(-_size(self.zero_points) * self.scheme.element.bits // 8)
        return total + 4 * self.scheme.tensor_scale + 4 * self.scheme.double_quant

    @property
    def bits_per_element(self) -> float:
        """Stored bits over elements (padding is paid for, not counted)."""
        return 8 * self.nbytes / max(math.prod(self.shape), 1)

    def __repr__(self) -> str:
        return (
            f"QuantizedTensor({self.scheme.name}, shape={list(self.shape)}, dtype={self.dtype}, "
            f"{self.bits_per_element:.4g} bits per element)"
        )

    @property
    def _stored_count(self) -> int:
        return math.prod(self.rows.stored_shape)

    @property
    def _in_order(self) -> bool:
        """Whether rows lie in memory as the tensor does."""
        rows = self.rows
        return rows.axis is None or (rows.axis == len(rows.shape) - 1 if rows.last else rows.axis == 0)

    def _row_scales(self) -> np.ndarray:
        stored = self.stored_scales
        if isinstance(stored, QuantizedTensor):
            scales = _numpy(stored.dequantize("float32")) + np.float32(self.scale_offset)
        else:
            scales = _numpy(stored)
            if self.scheme.scale.bits < 32:
                scales = fast.decode(scales, self.scheme.scale, "float32")
        return self.rows.scales_apart(scales) * np.float32(self.tensor_scale)

    def _like_packed(self, array: np.ndarray) -> Array:
        if not self.is_torch:
            return array
        return torch_loaded().from_numpy(array).to(self.packed.device)


def quantize(
    x: Any,
    format: str | ElementFormat | BlockFormat,
    *,
    block: int | None = None,
    axis: int = -1,
    granularity: Granularity | None = None,
    symmetric: bool = True,
    range: str = "minmax",
    percentile: float = 99.99,
    importance: Any = None,
    scale_rule: str = "floor",
    double_quant: bool = False,
    pad: bool = False,
    rounding: str = "nearest_even",
    seed: int = 0,
) -> QuantizedTensor:
    """Return ``x`` as packed codes with scales.

    Args:
        x: Numbers: a NumPy array, a torch tensor on any device, or Python numbers.
        format: A block format (``mxfp4``, ``nvfp4`` ...), a codebook (``nf4``: blocks of 64 unless told), an integer or
            a float of up to 16 bits (one scale for the tensor unless told).
        block: Elements that share a scale, along ``axis``.
        axis: The axis that blocks run along.
        granularity: ``PerTensor()``, ``PerChannel(axis)`` or ``PerBlock(size, axis)``, in place of ``block``.
        symmetric: Integers: whether zero is code zero (the middle code of an unsigned one); else a zero point per scale.
        range: ``minmax``, ``percentile`` or ``mse`` (the scale of least squared error among a fixed set).
        percentile: Share of the elements, in percent, that ``range="percentile"`` covers.
        importance: For ``mse``: weight of each element's squared error, broadcast to ``x``'s shape.
        scale_rule: Formats with power-of-two scales: ``floor`` (OCP's), ``ceil``, ``even`` or ``round_up``.
        double_quant: Whether FP32 scales are themselves quantised: less their mean, to int8 in blocks of 256.
        pad: Whether a block that does not fit is filled up with zeros (which are stored), instead of refused.
        rounding: How elements are rounded, as in :func:`narrowcast.formats.encode`.
        seed: Of stochastic rounding.

    Raises:
        FormatError: An unknown name, options that contradict each other, a block that does not divide the axis, numbers
            that are NaN or infinite where the scale cannot say so.
    """
    Rules.of(ELEMENTS["fp32"], rounding=rounding)
    scheme = Scheme.of(
        format,
        block=block,
        axis=axis,
        granularity=granularity,
        symmetric=symmetric,
        range=range,
        percentile=percentile,
        scale_rule=scale_rule,
        double_quant=double_quant,
        pad=pad,
        rounding=rounding,
    )
    if not symmetric and rounding != "nearest_even":
        raise FormatError(f"rounding = {rounding!r} with symmetric=False", allowed="nearest_even")
    if on_device(x):
        return device.quantize(x, scheme, importance, seed)
    source = opened(x)
    numbers = source.array
    if source.coded is not None:
        numbers = fast.decode(numbers, ELEMENTS[source.coded], "float32")
    elif numbers.dtype == np.float16:
        numbers = numbers.astype(np.float32)
    shape = numbers.shape
    layout = Rows.of(shape, scheme.granularity, pad=pad)
    weights = None
    if importance is not None:
        weights = layout.apart(np.broadcast_to(_weights(importance, shape), shape))
    return _quantized(layout.apart(numbers), scheme, layout, shape, source.dtype, weights, seed, source.back)


def _weights(importance: Any, shape: tuple[int, ...]) -> np.ndarray:
    weights = opened(importance).array
    try:
        np.broadcast_to(weights, shape)
    except ValueError:
        raise FormatError(
            f"importance of shape {list(weights.shape)} for a tensor of shape {list(shape)}",
            allowed="a shape that broadcasts to the tensor's",
        ) from None
    if not (weights >= 0).all():
        raise FormatError("importance below zero, or NaN", allowed="weights of 0 or more")
    return weights


def _quantized(
    rows: np.ndarray,
    scheme: Scheme,
    layout: Rows,
    shape: tuple[int, ...],
    dtype: str,
    weights: np.ndarray | None,
    seed: int,
    back: Any,
) -> QuantizedTensor:
    tensor_scale = _tensor_scale(rows, scheme) if scheme.tensor_scale else 1.0
    scales = np.zeros(layout.count, np.float32)
    zero_points = np.zeros(layout.count, np.int32) if ranges.has_zero_points(scheme) else None
    codes = np.empty(rows.shape, np.uint8 if scheme.element.bits <= 8 else np.uint16)
    at_once = not scheme.double_quant
    for part in _row_pieces(rows.shape):
        chosen = ranges.choose(rows[part], scheme, None if weights is None else weights[part], tensor_scale)
        _check_finite(chosen.scales, scheme, part.start)
        scales[part] = chosen.scales
        if zero_points is not None:
            zero_points[part] = chosen.zero_points
        if at_once:
            _encode_rows(rows, codes, part, Chosen(scales, zero_points), tensor_scale, scheme, seed)
    stored, offset = _stored_scales(scales, scheme, layout, back)
    if isinstance(stored, QuantizedTensor):  # encode against the scales that will decode
        scales = layout.scales_apart(_numpy(stored.dequantize("float32"))) + np.float32(offset)
        _encode_rows(rows, codes, slice(0, layout.count), Chosen(scales, zero_points), tensor_scale, scheme, seed)
    packed = pack_known(layout.together(codes).reshape(-1), scheme.element.bits)
    return QuantizedTensor(
        scheme,
        shape,
        dtype,
        back(packed),
        stored,
        None if zero_points is None else back(layout.scales_together(zero_points)),
        tensor_scale,
        offset,
    )


def _tensor_scale(rows: np.ndarray, scheme: Scheme) -> float:
    """Return the scale that makes the largest block scale its format's largest number (NVIDIA's NVFP4)."""
    largest = 0.0
    for part in _row_pieces(rows.shape):
        magnitude = np.abs(rows[part])
        largest = max(largest, float(np.max(magnitude, initial=0.0, where=np.isfinite(magnitude))))
    wanted = np.float32(largest / (element_max(scheme) * scheme.scale.max))
    smallest = np.finfo(np.float32).tiny  # a subnormal scale would lose digits, and zero everything
    return float(max(wanted, smallest)) if largest else 1.0


def _check_finite(scales: np.ndarray, scheme: Scheme, first: int) -> None:
    if scheme.scale.bits == 32 and not np.isfinite(scales).all():
        row = first + int(np.argmin(np.isfinite(scales)))
        raise FormatError(
            f"NaN, infinity or a range beyond float32 in row {row} of those that share a scale",
            allowed="finite numbers",
            next_step="replace them first, or use an MX format, whose scale can say NaN for a block",
        )


def _encode_rows(
    rows: np.ndarray, codes: np.ndarray, part: slice, chosen: Chosen, tensor_scale: float, scheme: Scheme, seed: int
) -> None:
    scales = chosen.scales * np.float32(tensor_scale)
    for inner, columns, start in _pieces(rows[part].shape, aligned=False):
        those = slice(part.start + inner.start, part.start + inner.stop)
        zero_points = None if chosen.zero_points is None else chosen.zero_points[those]
        place = part.start * rows.shape[1] + start
        codes[those, columns] = ranges.element_codes(
            rows[those, columns], scales[those], zero_points, scheme, place, seed
        )


def _stored_scales(scales: np.ndarray, scheme: Scheme, layout: Rows, back: Any) -> tuple[Any, float]:
    if scheme.double_quant:
        offset = float(np.float32(scales.mean(dtype=np.float64))) if scales.size else 0.0
        rest = back(layout.scales_together(scales).reshape(-1) - np.float32(offset))
        nested = quantize(rest, "int8", granularity=PerBlock(DOUBLE_BLOCK), pad=True)
        return nested, offset
    if scheme.scale.bits == 32:
        return back(layout.scales_together(scales)), 0.0
    codes = np.empty(scales.shape, np.uint8 if scheme.scale.bits <= 8 else np.uint16)
    fast.encode_part(scales, scheme.scale, Rules(overflow=Overflow.SATURATE), codes, 0, 0)
    return back(layout.scales_together(codes)), 0.0


def _row_pieces(shape: tuple[int, ...]) -> Iterator[slice]:
    """Cut rows into runs that stay in the cache; a row is never cut."""
    step = max(fast.CHUNK // max(shape[1], 1), 1)
    return (slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step))


def _pieces(shape: tuple[int, ...], *, aligned: bool) -> Iterator[tuple[slice, slice, int]]:
    """Cut rows, and long rows too, into pieces: (rows, columns, position). Aligned ones begin at whole bytes."""
    count, length = shape
    if not count or not length:
        return
    if length > fast.CHUNK and not (aligned and length % 8):
        for row in range(count):
            for column in range(0, length, fast.CHUNK):
                stop = min(column + fast.CHUNK, length)
                yield slice(row, row + 1), slice(column, stop), row * length + column
        return
    step = max(fast.CHUNK // length // 8 * 8, 8) if aligned else max(fast.CHUNK // length, 1)
    for start in range(0, count, step):
        yield slice(start, min(start + step, count)), slice(0, length), start * length



def _decode_packed(packed: np.ndarray, element: ElementFormat, out: np.ndarray) -> None:
    """Write the values of packed codes into ``out``, which is contiguous."""
    flat = out.reshape(-1)
    if element.bits == 4 and flat.size % 4 == 0:
        fast.decode_nibbles(packed, element, flat)
    else:
        flat[...] = fast.decode(unpack(packed, element.bits, flat.size), element, flat.dtype.name)


def _numpy(array: Array) -> np.ndarray:
    return array if isinstance(array, np.ndarray) else array.cpu().numpy()


def _size(array: Array) -> int:
    return math.prod(array.shape)


def _nbytes(array: Array) -> int:
    return _size(array) * (array.itemsize if isinstance(array, np.ndarray) else array.element_size())

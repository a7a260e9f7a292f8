"""quantize: a tensor as packed codes with scales."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from narrowcast.errors import FormatError
from narrowcast.formats import device, fast, ranges
from narrowcast.formats.arrays import code_dtype, on_device, opened
from narrowcast.formats.blocks import BlockFormat
from narrowcast.formats.checks import real, whole
from narrowcast.formats.engine import engine
from narrowcast.formats.granularity import Granularity, PerBlock
from narrowcast.formats.kinds import ElementFormat
from narrowcast.formats.packing import pack_known
from narrowcast.formats.ranges import Chosen
from narrowcast.formats.rows import Rows
from narrowcast.formats.rules import Overflow, Rules
from narrowcast.formats.scales import absmax, element_max
from narrowcast.formats.scheme import DOUBLE_BLOCK, Scheme
from narrowcast.formats.table import ELEMENTS, get
from narrowcast.formats.tensor import QuantizedTensor, host, moved, pieces

__all__ = ["quantize"]


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
    scale: str | ElementFormat | None = None,
    scale_rule: str = "floor",
    double_quant: bool = False,
    pad: bool = False,
    rounding: str = "nearest_even",
    seed: int = 0,
    tensor_max: float | None = None,
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
        importance: With ``mse`` alone: weight of each element's squared error, broadcast to ``x``'s shape.
        scale: Format of the scales, where the format does not say: ``fp32`` unless given, ``fp16``, ``bf16``, ``e8m0`` ...
        scale_rule: Formats with power-of-two scales: ``floor`` (OCP's), ``ceil``, ``even`` or ``round_up``.
        double_quant: Whether FP32 scales are themselves quantised: less their mean, to int8 in blocks of 256.
        pad: Whether a block that does not fit is filled up with zeros (which are stored), instead of refused.
        rounding: How elements are rounded, as in :func:`narrowcast.formats.encode`.
        seed: Of stochastic rounding.
        tensor_max: ``nvfp4``: largest magnitude of the whole tensor that ``x`` is a piece of, from which the tensor's own
            scale follows; the largest of ``x`` unless given.

    Raises:
        FormatError: An unknown name, options that contradict each other, a block that does not divide the axis, numbers
            that are NaN or infinite where the scale cannot say so.
    """
    scheme = Scheme.of(
        get(format),
        block=block,
        axis=axis,
        granularity=granularity,
        scale=scale,
        symmetric=symmetric,
        range=range,
        percentile=percentile,
        scale_rule=scale_rule,
        double_quant=double_quant,
        pad=pad,
        rounding=rounding,
    )
    Rules.of(ELEMENTS["fp32"], rounding=rounding)
    seed = whole("seed", seed)
    if not symmetric and rounding != "nearest_even":
        raise FormatError(f"rounding = {rounding!r} with symmetric=False", allowed="nearest_even")
    if importance is not None and scheme.range != "mse":
        raise FormatError(f"importance with range = {range!r}, which weighs nothing", allowed="range='mse'")
    if tensor_max is not None:
        tensor_max = real("tensor_max", tensor_max)
        _check_tensor_max(tensor_max, scheme, x)
    if on_device(x):
        return _on_device(x, scheme, importance, seed)
    return _in_memory(x, scheme, importance, seed, tensor_max)


def _on_device(x: Any, scheme: Scheme, importance: Any, seed: int) -> QuantizedTensor:
    """Quantise by a kernel, or through main memory where there is none for the scheme; the result is on the device."""
    shape = tuple(x.shape)
    layout = Rows.of(shape, scheme.granularity, pad=scheme.pad)
    made = device.quantize(x, scheme, layout) if importance is None else None
    if made is None:
        weights = None if importance is None else importance.cpu() if on_device(importance) else importance
        return moved(_in_memory(x.detach().cpu(), scheme, weights, seed), x.device)
    if made.broken >= 0:
        raise _not_finite(made.broken, scheme)
    dtype = str(x.dtype).removeprefix("torch.")
    return QuantizedTensor(scheme, shape, dtype, made.packed, made.scales, None, made.tensor_scale)


def _in_memory(x: Any, scheme: Scheme, importance: Any, seed: int, tensor_max: float | None = None) -> QuantizedTensor:
    source = opened(x)
    numbers = source.array
    if source.coded is not None:
        numbers = fast.decode(numbers, ELEMENTS[source.coded], "float32")
    elif numbers.dtype == np.float16:
        numbers = numbers.astype(np.float32)
    shape = numbers.shape
    layout = Rows.of(shape, scheme.granularity, pad=scheme.pad)
    weights = None
    if importance is not None:
        weights = layout.apart(np.broadcast_to(_weights(importance, shape), shape))
    rows = layout.apart(numbers)
    tensor_scale = 1.0
    if scheme.tensor_scale:
        tensor_scale = _tensor_scale(_largest(rows) if tensor_max is None else tensor_max, scheme)
    return _quantized(rows, scheme, layout, shape, source.dtype, weights, seed, source.back, tensor_scale)


def _check_tensor_max(tensor_max: float, scheme: Scheme, x: Any) -> None:
    if not scheme.tensor_scale:
        raise FormatError(
            f"tensor_max = {tensor_max} with {scheme.name}, whose scales look no further than their block",
            allowed="formats with a scale for the whole tensor, such as nvfp4",
        )
    if not 0 <= tensor_max < np.inf:
        raise FormatError(f"tensor_max = {tensor_max}", allowed="a finite magnitude")
    if on_device(x):
        raise FormatError(
            "tensor_max for a tensor on a device", allowed="NumPy arrays and torch tensors in main memory"
        )


def _weights(importance: Any, shape: tuple[int, ...]) -> np.ndarray:
    weights = opened(importance).array
    try:
        np.broadcast_to(weights, shape)
    except ValueError:
        raise FormatError(
            f"importance of shape {list(weights.shape)} for a tensor of shape {list(shape)}",
            allowed="a shape that broadcasts to the tensor's",
        ) from None
    if not (np.isfinite(weights) & (weights >= 0)).all():
        raise FormatError("importance below zero, infinite or NaN", allowed="finite weights of 0 or more")
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
    tensor_scale: float,
) -> QuantizedTensor:
    scales = np.zeros(layout.count, np.float32)
    zero_points = np.zeros(layout.count, np.int32) if ranges.has_zero_points(scheme) else None
    codes = np.empty(rows.shape, code_dtype(scheme.element.bits))
    at_once = not scheme.double_quant
    for part in _row_pieces(rows.shape):
        chosen = ranges.choose(rows[part], scheme, None if weights is None else weights[part], tensor_scale)
        _check_finite(chosen.scales, scheme, part.start)
        scales[part] = chosen.scales
        if zero_points is not None and chosen.zero_points is not None:
            zero_points[part] = chosen.zero_points
        if at_once:
            _encode_rows(rows, codes, part, Chosen(scales, zero_points), tensor_scale, scheme, seed)
    stored, offset = _stored_scales(scales, scheme, layout, back)
    if isinstance(stored, QuantizedTensor):  # encode against the scales that will decode
        scales = layout.scales_apart(host(stored.dequantize("float32"))) + np.float32(offset)
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


def _largest(rows: np.ndarray) -> float:
    """Return the largest finite magnitude; 0 if there is none."""
    largest = 0.0
    for part in _row_pieces(rows.shape):
        magnitude = absmax(rows[part])
        if not np.isfinite(magnitude).all():
            magnitude = np.abs(rows[part])
        largest = max(largest, float(np.max(magnitude, initial=0.0, where=np.isfinite(magnitude))))
    return largest


def _tensor_scale(largest: float, scheme: Scheme) -> float:
    """Return the scale that makes the largest block scale its format's largest number (NVIDIA's NVFP4)."""
    wanted = np.float32(largest / (element_max(scheme) * scheme.scale.max))
    smallest = np.finfo(np.float32).tiny  # a subnormal scale would lose digits, and zero everything
    return float(max(wanted, smallest)) if largest else 1.0


def _check_finite(scales: np.ndarray, scheme: Scheme, first: int) -> None:
    if scheme.scale.bits > 8 and not np.isfinite(scales).all():
        raise _not_finite(first + int(np.argmin(np.isfinite(scales))), scheme)


def _not_finite(row: int, scheme: Scheme) -> FormatError:
    return FormatError(
        f"NaN, infinity or a range beyond {scheme.scale.name} in row {row} of those that share a scale",
        allowed="finite numbers",
        next_step="replace them first, or use an MX format, whose scale can say NaN for a block",
    )


def _encode_rows(
    rows: np.ndarray, codes: np.ndarray, part: slice, chosen: Chosen, tensor_scale: float, scheme: Scheme, seed: int
) -> None:
    scales = chosen.scales * np.float32(tensor_scale)
    for inner, columns, start in pieces(rows[part].shape, aligned=False):
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
    codes = np.empty(scales.shape, code_dtype(scheme.scale.bits))
    fast.encode_part(scales, scheme.scale, Rules(overflow=Overflow.SATURATE), codes, 0, 0)
    return back(layout.scales_together(codes)), 0.0


def _row_pieces(shape: tuple[int, ...]) -> Iterator[slice]:
    """Cut rows into runs that stay in the cache; a row is never cut."""
    step = max(engine().CHUNK // max(shape[1], 1), 1)
    return (slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step))

"""QuantizedTensor: packed codes, what they are multiplied by, and the way back to numbers and to a file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from narrowcast.errors import FormatError
from narrowcast.formats import device, fast, storage
from narrowcast.formats.arrays import Array, on_device, torch_loaded
from narrowcast.formats.engine import engine
from narrowcast.formats.packing import pack_known, packed_size, unpack_known
from narrowcast.formats.portable import Values
from narrowcast.formats.rows import Rows
from narrowcast.formats.scheme import Scheme
from narrowcast.formats.tables import values_of

__all__ = ["QuantizedTensor", "host", "load", "moved", "pieces", "save"]

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
        if dtype is None:
            dtype = self.dtype if self.dtype in _DTYPES else "float32"
        if not isinstance(dtype, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise FormatError(f"dtype = {dtype!r:.100}", allowed=", ".join(_DTYPES))
        if dtype not in _DTYPES or (dtype == "bfloat16" and not self.is_torch):
            allowed = _DTYPES if self.is_torch else _DTYPES[:3]
            if self.dtype == dtype:
                dtype = "float32"  # an array of ml_dtypes: NumPy alone has no such dtype
            else:
                raise FormatError(f"dtype = {dtype!r}", allowed=", ".join(allowed))
        if on_device(self.packed):
            return self._on_device(dtype)
        values = self._values("float64" if dtype == "float64" else "float32")
        if not self.is_torch:
            with np.errstate(over="ignore"):
                return values.astype(dtype, copy=False)
        torch = torch_loaded()
        return torch.from_numpy(values).to(getattr(torch, dtype))

    def _on_device(self, dtype: str) -> Array:
        """Dequantise by a kernel, or through main memory where there is none for the scheme."""
        scales, values = self.stored_scales, None
        if not isinstance(scales, QuantizedTensor) and self.zero_points is None:
            values = device.dequantize(self.packed, scales, self.scheme, self.rows, self.tensor_scale, dtype)
        return moved(self, "cpu").dequantize(dtype).to(self.packed.device) if values is None else values

    def _values(self, work: str) -> np.ndarray:
        layout = self.rows
        scales = self._row_scales().astype(work, copy=False)
        zero_points = None if self.zero_points is None else layout.scales_apart(host(self.zero_points))
        packed, bits = host(self.packed), self.scheme.element.bits
        values = np.empty((layout.count, layout.length), work)
        if not layout.in_order:
            codes = layout.rows_of_stored(unpack_known(packed, bits, values.size))
            packed = pack_known(codes.reshape(-1), bits)
        table = values_of(self.scheme.element, work)
        if bits == 4 and zero_points is None and layout.length % 2 == 0 and values.size:
            engine().decoded_nibbles(packed, scales, table, values)
        else:
            _decode_pieces(packed, bits, table, scales, zero_points, values)
        return layout.without_padding(layout.together(values)).reshape(self.shape)

    def check(self) -> None:
        """Check that the arrays are as long as the shape and the scheme say.

        Raises:
            FormatError: They are not.
        """
        wanted = packed_size(self._stored_count, self.scheme.element.bits)
        if _count(self.packed) != wanted:
            raise FormatError(f"{_count(self.packed)} bytes of codes", allowed=f"{wanted} for shape {list(self.shape)}")
        scales = self.stored_scales
        count = math.prod(scales.shape)
        if count != self.rows.count:
            raise FormatError(f"{count} scales", allowed=f"{self.rows.count} for shape {list(self.shape)}")
        if isinstance(scales, QuantizedTensor):
            scales.check()

    def save(self, path: str | Path) -> None:
        """Write this tensor to a safetensors file, under the name ``tensor``; several go into one with ``save``."""
        save({"tensor": self}, path)

    @staticmethod
    def load(path: str | Path, *, torch: bool = False) -> QuantizedTensor:
        """Return the tensor that :meth:`save` wrote, as NumPy's or torch's.

        Raises:
            FormatError: No such file, or one that holds something else.
        """
        tensors = load(path, torch=torch)
        if list(tensors) != ["tensor"]:
            raise FormatError(f"{path} holds {', '.join(tensors) or 'nothing'}", next_step="narrowcast.formats.load")
        return tensors["tensor"]

    @property
    def codes(self) -> Array:
        """The codes, unpacked: the tensor's shape (with its padding), uint8 or uint16."""
        codes = unpack_known(host(self.packed), self.scheme.element.bits, self._stored_count)
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
            total += -(-_count(self.zero_points) * self.scheme.element.bits // 8)
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

    def _row_scales(self) -> np.ndarray:
        stored = self.stored_scales
        if isinstance(stored, QuantizedTensor):
            scales = host(stored.dequantize("float32")) + np.float32(self.scale_offset)
        else:
            scales = host(stored)
            if self.scheme.scale.bits < 32:
                scales = fast.decode(scales, self.scheme.scale, "float32")
        return self.rows.scales_apart(scales) * np.float32(self.tensor_scale)

    def _like_packed(self, array: np.ndarray) -> Array:
        if not self.is_torch:
            return array
        return torch_loaded().from_numpy(array).to(self.packed.device)


def save(tensors: Mapping[str, QuantizedTensor], path: str | Path) -> None:
    """Write quantised tensors to a safetensors file: all of it, or nothing.

    Args:
        tensors: By name; a name holds no slash.
        path: The file; replaced if it exists.

    Raises:
        FormatError: A name that cannot be used, or a folder that cannot be written.
    """
    arrays: dict[str, np.ndarray] = {}
    described: dict[str, Any] = {}
    if not isinstance(tensors, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise FormatError(
            f"tensors = {tensors!r:.100}", allowed="quantised tensors by name: {'weight': quantize(w, 'nf4')}"
        )
    for name, tensor in tensors.items():
        if "/" in name:
            raise FormatError(f"tensor name {name!r}", allowed="names without '/'")
        described[name] = _split(name, tensor, arrays)
    storage.write(path, arrays, described)


def load(path: str | Path, *, torch: bool = False) -> dict[str, QuantizedTensor]:
    """Return the quantised tensors of a file that :func:`save` wrote.

    Args:
        path: The file.
        torch: Whether the tensors come back as torch's instead of NumPy's.

    Raises:
        FormatError: No such file, or one that this version cannot read.
    """
    arrays, described = storage.read(path, torch=torch)
    try:
        tensors = {name: _joined(name, plain, arrays) for name, plain in described.items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(f"{path} is damaged: {error!r}", next_step="write it again") from None
    for tensor in tensors.values():
        tensor.check()
    return tensors


def _split(name: str, tensor: QuantizedTensor, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Put a tensor's arrays beside the others, and return the rest of it."""
    arrays[f"{name}/packed"] = host(tensor.packed)
    plain: dict[str, Any] = {
        "scheme": tensor.scheme.to_json(),
        "shape": list(tensor.shape),
        "dtype": tensor.dtype,
        "tensor_scale": tensor.tensor_scale,
        "scale_offset": tensor.scale_offset,
    }
    if isinstance(tensor.stored_scales, QuantizedTensor):
        plain["scales"] = _split(f"{name}/scales", tensor.stored_scales, arrays)
    else:
        arrays[f"{name}/scales"] = host(tensor.stored_scales)
    if tensor.zero_points is not None:
        arrays[f"{name}/zero_points"] = host(tensor.zero_points)
    return plain


def _joined(name: str, plain: dict[str, Any], arrays: Mapping[str, Array]) -> QuantizedTensor:
    nested = plain.get("scales")
    return QuantizedTensor(
        scheme=Scheme.from_json(plain["scheme"]),
        shape=tuple(int(size) for size in plain["shape"]),
        dtype=str(plain["dtype"]),
        packed=arrays[f"{name}/packed"],
        stored_scales=_joined(f"{name}/scales", nested, arrays) if nested else arrays[f"{name}/scales"],
        zero_points=arrays.get(f"{name}/zero_points"),
        tensor_scale=float(plain["tensor_scale"]),
        scale_offset=float(plain["scale_offset"]),
    )


def moved(tensor: QuantizedTensor, device: Any) -> QuantizedTensor:
    """Return a quantised tensor of torch's with its arrays on a device of torch's."""
    scales, zero_points = tensor.stored_scales, tensor.zero_points
    return replace(
        tensor,
        packed=tensor.packed.to(device),
        stored_scales=moved(scales, device) if isinstance(scales, QuantizedTensor) else scales.to(device),
        zero_points=None if zero_points is None else zero_points.to(device),
    )


def pieces(shape: tuple[int, ...], *, aligned: bool) -> Iterator[tuple[slice, slice, int]]:
    """Cut rows, and long rows too, into pieces: (rows, columns, position). Aligned ones begin at whole bytes."""
    count, length = shape
    if not count or not length:
        return
    if length > engine().CHUNK and not (aligned and length % 8):
        for row in range(count):
            for column in range(0, length, engine().CHUNK):
                stop = min(column + engine().CHUNK, length)
                yield slice(row, row + 1), slice(column, stop), row * length + column
        return
    step = max(engine().CHUNK // length // 8 * 8, 8) if aligned else max(engine().CHUNK // length, 1)
    for start in range(0, count, step):
        yield slice(start, min(start + step, count)), slice(0, length), start * length


def _decode_pieces(
    packed: np.ndarray, bits: int, table: Values, scales: np.ndarray, zero_points: np.ndarray | None, out: np.ndarray
) -> None:
    """Write the values of packed codes times their rows' scales."""
    for rows, columns, start in pieces(out.shape, aligned=True):
        values = out[rows, columns]
        part = packed[start * bits // 8 : -(-(start + values.size) * bits // 8)]
        engine().decoded(unpack_known(part, bits, values.size), table, values.reshape(-1))
        if zero_points is not None:
            values -= zero_points[rows, None].astype(out.dtype)
        with np.errstate(invalid="ignore", over="ignore"):
            values *= scales[rows, None]


def host(array: Array) -> np.ndarray:
    """Return an array in main memory, as NumPy's."""
    return array if isinstance(array, np.ndarray) else array.cpu().numpy()


def _count(array: Array) -> int:
    return math.prod(array.shape)


def _nbytes(array: Array) -> int:
    return _count(array) * (array.itemsize if isinstance(array, np.ndarray) else array.element_size())

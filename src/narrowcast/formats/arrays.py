"""What goes into a codec, as an array it can work on, and the way back to what the caller uses.

torch is never imported here unless somebody already has: a tensor cannot exist without it.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from narrowcast.errors import FormatError

__all__ = ["Array", "Opened", "code_dtype", "dtype_name", "on_device", "opened", "opened_codes", "torch_loaded"]

Array = Any  # numpy.ndarray or torch.Tensor

FLOATS = ("float64", "float32", "float16")
WHOLE = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool")
_NUMBERS = frozenset((*FLOATS, *WHOLE))
EXACT_WHOLE = 1 << 53
# Dtypes that hold the codes of a format, in torch and in ml_dtypes, and which format that is.
CODED = {
    "bfloat16": "bf16",
    "float8_e4m3fn": "e4m3fn",
    "float8_e5m2": "e5m2",
    "float8_e4m3": "e4m3",
    "float8_e3m4": "e3m4",
    "float8_e4m3fnuz": "e4m3fnuz",
    "float8_e5m2fnuz": "e5m2fnuz",
    "float8_e4m3b11fnuz": "e4m3b11fnuz",
    "float8_e8m0fnu": "e8m0",
    "float6_e3m2fn": "e3m2",
    "float6_e2m3fn": "e2m3",
    "float4_e2m1fn": "e2m1",
}


class Opened(NamedTuple):
    """An array ready for a codec.

    Args:
        array: float64, float32 or float16 numbers, or unsigned codes: a NumPy array, or a torch tensor on a device.
        dtype: Name of the dtype that the caller's array has.
        coded: The format whose codes ``array`` holds, for a dtype that NumPy does not compute with; else None.
        torch: Whether the caller's array is a torch tensor.
        own: The caller's dtype itself.
    """

    array: Array
    dtype: str
    coded: str | None
    torch: bool
    own: Any

    def back(self, result: np.ndarray) -> Array:
        """Return a NumPy result as the kind of array that came in."""
        return torch_loaded().from_numpy(result) if self.torch else result

    def back_as_coded(self, codes: np.ndarray) -> Array:
        """Return codes of ``coded`` in the dtype that came in."""
        return self.back(codes).view(self.own)


def torch_loaded() -> Any:
    """Return the torch module if somebody imported it, else None."""
    return sys.modules.get("torch")


def on_device(x: Any) -> bool:
    """Return whether ``x`` is a torch tensor outside main memory.

    Raises:
        FormatError: It is on the meta device.
    """
    torch = torch_loaded()
    if torch is None or not isinstance(x, torch.Tensor) or x.is_cpu:
        return False
    if x.is_meta:
        raise FormatError("a tensor on the meta device, which holds no numbers", allowed="tensors with numbers")
    return True


@lru_cache(maxsize=64)
def code_dtype(bits: int) -> str:
    """Return the name of the unsigned dtype that holds codes of that many bits."""
    return f"uint{next(width for width in (8, 16, 32, 64) if bits <= width)}"


@lru_cache(maxsize=256)
def dtype_name(dtype: Any) -> str:
    """Return what NumPy and torch both call a dtype; kept, as NumPy looks long for the name of one of its own."""
    return dtype.name if isinstance(dtype, np.dtype) else str(dtype).removeprefix("torch.")


@lru_cache(maxsize=256)
def _known(dtype: Any) -> tuple[str, str | None, bool]:
    """Return a dtype's name, the format whose codes it holds, and whether codecs compute with it as it is."""
    name = dtype_name(dtype)
    return name, CODED.get(name), name in FLOATS and (not isinstance(dtype, np.dtype) or dtype.isnative)


def opened(x: Any) -> Opened:
    """Return ``x`` ready for a codec: any floating-point or whole numbers, of NumPy, torch (in main memory) or Python.

    Raises:
        FormatError: A dtype that is no real number, or whole numbers that float64 cannot hold.
    """
    torch = torch_loaded()
    if torch is not None and isinstance(x, torch.Tensor):
        own = x.dtype
        dtype, coded, ready = _known(own)
        if x.layout is not torch.strided:
            raise FormatError(f"a tensor of layout {x.layout}", next_step="give x.to_dense()")
        if ready:
            return Opened(x.numpy(force=True), dtype, None, True, own)
        if coded is not None:
            codes = x.detach().view(getattr(torch, code_dtype(8 * x.element_size())))
            return Opened(codes.numpy(), dtype, coded, True, own)
        if dtype not in _NUMBERS:
            raise refused(dtype)
        return Opened(_numbers(x.numpy(force=True), dtype), dtype, None, True, own)
    try:
        array = np.asarray(x)  # what is no number, or whole and too large, shows in the dtype that NumPy gives it
    except (TypeError, ValueError) as error:
        raise FormatError(f"{type(x).__name__} is no array of numbers: {error}", allowed=_allowed()) from None
    dtype, coded, ready = _known(array.dtype)
    if ready:
        return Opened(array, dtype, None, False, array.dtype)
    if coded is not None:
        return Opened(array.view(code_dtype(8 * array.itemsize)), dtype, coded, False, array.dtype)
    return Opened(_numbers(array, dtype), dtype, None, False, array.dtype)


def opened_codes(codes: Any, bits: int, last: int) -> Opened:
    """Return ``codes`` as unsigned integers for ``bits`` bits, each checked to be ``last`` at most.

    Raises:
        FormatError: Something that is not whole numbers, or a code out of range.
    """
    torch = torch_loaded()
    is_tensor = torch is not None and isinstance(codes, torch.Tensor)
    array = codes.numpy(force=True) if is_tensor else np.asarray(codes)
    if array.dtype.kind not in "iu":
        raise FormatError(
            f"codes of dtype {array.dtype.name}", allowed="whole numbers", next_step="decode takes what encode gave"
        )
    wanted = code_dtype(bits)
    if array.size and (array.dtype.kind == "i" or last < (1 << 8 * array.itemsize) - 1):
        lowest, highest = int(array.min()), int(array.max())
        if lowest < 0 or highest > last:
            raise FormatError(f"code {lowest if lowest < 0 else highest} of {bits} bits", allowed=f"0 to {last}")
    return Opened(array.astype(wanted, copy=False), wanted, None, is_tensor, array.dtype)


def _numbers(array: np.ndarray, dtype: str) -> np.ndarray:
    if dtype in FLOATS:
        return array if array.dtype.isnative else array.astype(dtype)
    if dtype not in WHOLE:
        raise refused(dtype)
    if array.dtype.itemsize == 8 and array.size:
        furthest = max(int(array.max()), -int(array.min()))
        if furthest > EXACT_WHOLE:
            raise FormatError(f"the whole number {furthest}", allowed="up to 2**53, which float64 holds exactly")
    return array.astype(np.float64)


def refused(dtype: str) -> FormatError:
    return FormatError(f"numbers of dtype {dtype} cannot be encoded", allowed=_allowed())


def _allowed() -> str:
    return ", ".join((*FLOATS, *CODED, "whole numbers"))

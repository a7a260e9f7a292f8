"""Codes of fewer than eight bits, packed into bytes without gaps, and back.

Code ``i`` of ``bits`` bits lies in bits ``i * bits`` to ``(i + 1) * bits - 1`` of the stream, the lowest bit of byte 0
first. For four bits the other order of the two nibbles, which bitsandbytes and GGUF's relatives use, is there by name.
"""

from __future__ import annotations

import numpy as np

from narrowcast.errors import FormatError
from narrowcast.formats.arrays import Array, on_device, torch_loaded
from narrowcast.formats.checks import whole

__all__ = ["pack", "pack_known", "packed_size", "unpack", "unpack_known"]

_ORDERS = ("low_first", "high_first")


def packed_size(count: int, bits: int) -> int:
    """Return the bytes that ``count`` codes of ``bits`` bits take, the last one filled up with zeros."""
    return -(-count * bits // 8)


def pack(codes: Array, bits: int, *, order: str = "low_first") -> Array:
    """Return codes as bytes: shape [ceil(n * bits / 8)], uint8, of the kind that came in and on its device.

    Args:
        codes: Unsigned codes below ``2**bits``, of any shape, read in C order: an array, or a torch tensor.
        bits: 1 to 8, or 16.
        order: For four bits, which half of a byte holds the first of two codes: ``low_first`` or ``high_first``.

    Raises:
        FormatError: A width or order that there is not, or a code out of range.
    """
    bits = _checked(bits, order)
    flat = _flat(codes)
    if flat.dtype.kind not in "iu":
        raise FormatError(f"codes of dtype {flat.dtype.name}", allowed=f"whole numbers, 0 to {(1 << bits) - 1}")
    if flat.size and (int(flat.max()) >> bits or int(flat.min()) < 0):
        raise FormatError(f"codes from {flat.min()} up to {flat.max()}", allowed=f"0 to {(1 << bits) - 1}")
    return _as(codes, pack_known(flat, bits, high_first=order == "high_first"))


def pack_known(flat: np.ndarray, bits: int, *, high_first: bool = False) -> np.ndarray:
    """As :func:`pack`, of flat codes known to be in range."""
    if bits == 16:
        return flat.astype("<u2", copy=False).view(np.uint8)
    flat = flat.astype(np.uint8, copy=False)
    if bits == 8:
        return flat
    if bits == 4:
        return _pack_nibbles(flat, high_first)
    whole = np.zeros(-(-flat.size // 8) * 8, np.uint8)
    whole[: flat.size] = flat
    word = np.zeros(whole.size // 8, np.uint64)
    for place in range(8):
        word |= whole[place::8].astype(np.uint64) << np.uint64(place * bits)
    spread = word.astype("<u8", copy=False).view(np.uint8).reshape(-1, 8)[:, :bits]
    return np.ascontiguousarray(spread).reshape(-1)[: packed_size(flat.size, bits)]


def _pack_nibbles(flat: np.ndarray, high_first: bool) -> np.ndarray:
    if flat.size % 2:
        flat = np.append(flat, np.uint8(0))
    pair = flat.view("<u2")
    pair = (pair << 4 | pair >> 8) if high_first else (pair | pair >> 4)
    return pair.astype(np.uint8)


def unpack(packed: Array, bits: int, count: int, *, order: str = "low_first") -> Array:
    """Return ``count`` codes from bytes that :func:`pack` gave: shape [count], uint8 (uint16 for 16 bits).

    Raises:
        FormatError: A width or order that there is not, no bytes, or fewer than the codes take.
    """
    bits, count = _checked(bits, order), whole("count", count)
    stream = _flat(packed)
    if stream.dtype != np.uint8 or count < 0:
        raise FormatError(f"{count} codes from an array of {stream.dtype.name}", allowed="0 codes or more, from uint8")
    if stream.size < packed_size(count, bits):
        raise FormatError(
            f"{stream.size} bytes for {count} codes of {bits} bits", allowed=f"{packed_size(count, bits)} bytes"
        )
    return _as(packed, unpack_known(stream, bits, count, high_first=order == "high_first"))


def unpack_known(packed: np.ndarray, bits: int, count: int, *, high_first: bool = False) -> np.ndarray:
    """As :func:`unpack`, of flat bytes known to hold the codes."""
    if bits == 16:
        return packed[: 2 * count].view("<u2").astype(np.uint16, copy=False)
    if bits == 8:
        return packed[:count]
    if bits == 4:
        both = packed.astype(np.uint16)
        pair = (both >> 4 | both << 8) & 0x0F0F if high_first else (both | both << 4) & 0x0F0F
        return pair.astype("<u2", copy=False).view(np.uint8)[:count]
    words = np.zeros((-(-packed.size // bits), 8), np.uint8)
    whole = np.zeros(words.shape[0] * bits, np.uint8)
    whole[: packed.size] = packed
    words[:, :bits] = whole.reshape(-1, bits)
    stream = words.view("<u8").reshape(-1, 1)
    places = (np.arange(8) * bits).astype(np.uint64)
    return ((stream >> places) & np.uint64((1 << bits) - 1)).astype(np.uint8).reshape(-1)[:count]


def _flat(array: Array) -> np.ndarray:
    torch = torch_loaded()
    if on_device(array) or (torch is not None and isinstance(array, torch.Tensor)):
        array = array.numpy(force=True)
    return np.ascontiguousarray(array).reshape(-1)


def _as(given: Array, result: np.ndarray) -> Array:
    """Return a result as the kind of array that was given, and where that lies."""
    torch = torch_loaded()
    if torch is not None and isinstance(given, torch.Tensor):
        return torch.from_numpy(result).to(given.device)
    return result


def _checked(bits: int, order: str) -> int:
    bits = whole("bits", bits)
    if bits not in (1, 2, 3, 4, 5, 6, 7, 8, 16):
        raise FormatError(f"packing codes of {bits} bits", allowed="1 to 8, or 16")
    if not isinstance(order, str) or order not in _ORDERS:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise FormatError(f"order = {order!r:.100}", allowed=", ".join(_ORDERS))
    if order == "high_first" and bits != 4:
        raise FormatError(f"order = 'high_first' with {bits} bits", allowed="low_first, or 4 bits")
    return bits

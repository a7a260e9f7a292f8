"""Codes of fewer than eight bits, packed into bytes without gaps, and back.

Code ``i`` of ``bits`` bits lies in bits ``i * bits`` to ``(i + 1) * bits - 1`` of the stream, the lowest bit of byte 0
first. For four bits the other order of the two nibbles, which bitsandbytes and GGUF's relatives use, is there by name.
"""

from __future__ import annotations

import numpy as np

from narrowcast.errors import FormatError

__all__ = ["pack", "packed_size", "unpack"]

_ORDERS = ("low_first", "high_first")


def packed_size(count: int, bits: int) -> int:
    """Return the bytes that ``count`` codes of ``bits`` bits take, the last one filled up with zeros."""
    return -(-count * bits // 8)


def pack(codes: np.ndarray, bits: int, *, order: str = "low_first") -> np.ndarray:
    """Return codes as bytes: shape [ceil(n * bits / 8)], uint8.

    Args:
        codes: Unsigned codes below ``2**bits``, any shape; read in C order.
        bits: 1 to 8, or 16.
        order: For four bits, which half of a byte holds the first of two codes: ``low_first`` or ``high_first``.

    Raises:
        FormatError: A width or order that there is not, or a code out of range.
    """
    _check(bits, order)
    flat = np.ascontiguousarray(codes).reshape(-1)
    if flat.dtype.kind not in "iu" or (flat.size and (int(flat.max()) >> bits or int(flat.min()) < 0)):
        raise FormatError(f"codes of dtype {flat.dtype.name} up to {flat.max()!s}", allowed=f"0 to {(1 << bits) - 1}")
    return pack_known(flat, bits, high_first=order == "high_first")


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


def unpack(packed: np.ndarray, bits: int, count: int, *, order: str = "low_first") -> np.ndarray:
    """Return ``count`` codes from bytes that :func:`pack` gave: shape [count], uint8 (uint16 for 16 bits).

    Raises:
        FormatError: A width or order that there is not, no bytes, or fewer than the codes take.
    """
    _check(bits, order)
    packed = np.ascontiguousarray(packed).reshape(-1)
    if packed.dtype != np.uint8 or count < 0:
        raise FormatError(f"{count} codes from an array of {packed.dtype.name}", allowed="0 codes or more, from uint8")
    if packed.size < packed_size(count, bits):
        raise FormatError(
            f"{packed.size} bytes for {count} codes of {bits} bits", allowed=f"{packed_size(count, bits)} bytes"
        )
    if bits == 16:
        return packed[: 2 * count].view("<u2").astype(np.uint16, copy=False)
    if bits == 8:
        return packed[:count]
    if bits == 4:
        both = packed.astype(np.uint16)
        pair = (both >> 4 | both << 8) & 0x0F0F if order == "high_first" else (both | both << 4) & 0x0F0F
        return pair.astype("<u2", copy=False).view(np.uint8)[:count]
    words = np.zeros((-(-packed.size // bits), 8), np.uint8)
    whole = np.zeros(words.shape[0] * bits, np.uint8)
    whole[: packed.size] = packed
    words[:, :bits] = whole.reshape(-1, bits)
    stream = words.view("<u8").reshape(-1, 1)
    places = (np.arange(8) * bits).astype(np.uint64)
    return ((stream >> places) & np.uint64((1 << bits) - 1)).astype(np.uint8).reshape(-1)[:count]


def _check(bits: int, order: str) -> None:
    if bits not in (1, 2, 3, 4, 5, 6, 7, 8, 16):
        raise FormatError(f"packing codes of {bits} bits", allowed="1 to 8, or 16")
    if order not in _ORDERS:
        raise FormatError(f"order = {order!r}", allowed=", ".join(_ORDERS))
    if order == "high_first" and bits != 4:
        raise FormatError(f"order = 'high_first' with {bits} bits", allowed="low_first, or 4 bits")

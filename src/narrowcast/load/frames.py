"""What the load generator and its sender processes say to each other: a JSON document and bytes, behind their lengths."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from typing import Any, cast

__all__ = ["Frame", "pack", "read", "receive"]

#: A document and the bytes that go with it.
Frame = tuple[dict[str, Any], bytes]

_LENGTHS = struct.Struct("<IQ")


def pack(document: dict[str, Any], blob: bytes = b"") -> bytes:
    """Return a frame as it goes over the socket."""
    text = json.dumps(document).encode()
    return b"".join((_LENGTHS.pack(len(text), len(blob)), text, blob))


def receive(connection: socket.socket) -> Frame | None:
    """Return the next frame of a blocking socket, or None at its end."""
    head = _exactly(connection, _LENGTHS.size)
    if head is None:
        return None
    sizes = cast(tuple[int, int], _LENGTHS.unpack(head))
    text, blob = (_exactly(connection, size) for size in sizes)
    return None if text is None or blob is None else (json.loads(text), blob)


def _exactly(connection: socket.socket, size: int) -> bytes | None:
    data = bytearray()
    while len(data) < size:
        part = connection.recv(min(size - len(data), 1 << 20))
        if not part:
            return None
        data += part
    return bytes(data)


async def read(stream: asyncio.StreamReader) -> Frame | None:
    """Return the next frame of a stream, or None at its end."""
    try:
        lengths = cast(tuple[int, int], _LENGTHS.unpack(await stream.readexactly(_LENGTHS.size)))
        return json.loads(await stream.readexactly(lengths[0])), await stream.readexactly(lengths[1])
    except (asyncio.IncompleteReadError, ConnectionError):
        return None

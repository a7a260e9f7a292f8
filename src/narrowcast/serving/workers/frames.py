"""What a server and its worker processes say to each other: JSON documents behind their lengths. No pickles."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from typing import Any, cast

import orjson

from narrowcast.serving.datatypes import DATATYPES
from narrowcast.serving.signature import Signature, TensorSpec

__all__ = ["Frames", "pack", "read_signature", "receive", "write_signature"]

_LENGTH = struct.Struct("<I")
_CHUNK = 1 << 16


def pack(document: dict[str, Any]) -> bytes:
    """Return a document as it goes over the socket."""
    text = orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
    return _LENGTH.pack(len(text)) + text


class Frames:
    """Documents out of a stream of bytes."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> Iterator[dict[str, Any]]:
        """Yield the documents that are complete."""
        self._data += data
        while len(self._data) >= _LENGTH.size:
            end = _LENGTH.size + cast(int, _LENGTH.unpack_from(self._data)[0])
            if len(self._data) < end:
                return
            document = orjson.loads(self._data[_LENGTH.size : end])
            del self._data[:end]
            yield document


def receive(connection: socket.socket) -> Iterator[dict[str, Any]]:
    """Yield the documents of a blocking socket until its end."""
    frames = Frames()
    while data := connection.recv(_CHUNK):
        yield from frames.feed(data)


def write_signature(signature: Signature) -> dict[str, Any]:
    """Return a signature as a document."""
    return {
        "inputs": [[spec.name, spec.datatype.name, spec.shape] for spec in signature.inputs],
        "outputs": [[spec.name, spec.datatype.name, spec.shape] for spec in signature.outputs],
        "batched": signature.batched,
    }


def read_signature(document: dict[str, Any]) -> Signature:
    """Return the signature that a document describes."""
    inputs, outputs = (
        tuple(TensorSpec(name, DATATYPES[datatype], tuple(shape)) for name, datatype, shape in document[key])
        for key in ("inputs", "outputs")
    )
    return Signature(inputs, outputs, document["batched"])

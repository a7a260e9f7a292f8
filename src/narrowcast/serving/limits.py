"""What one client may ask of the server before anything is computed."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["HEADER_OVERHEAD", "Limits"]

#: What a header costs beyond its bytes, as HTTP/2 counts it (RFC 9113, 6.5.2).
HEADER_OVERHEAD = 32


@dataclass(frozen=True)
class Limits:
    """Bounds on sizes and times.

    Attributes:
        target_bytes: Length of a request target (path and query).
        header_bytes: Names and values of all headers of a request, and :data:`HEADER_OVERHEAD` for each.
        body_bytes: Body of a request as it is sent.
        decompressed_bytes: Body of a request after decompression.
        tensors: Inputs, and outputs asked for, of one request.
        rank: Axes of one tensor.
        connections: Connections at a time; one more is answered 503 and closed.
        pipelined: Requests of one connection that wait for answers before the server stops reading.
        header_seconds: From the first byte of a request to the end of its headers.
        body_seconds: From the end of the headers to the end of the body.
        idle_seconds: How long a connection may wait between requests.
        write_seconds: How long a client may take no byte of an answer.
    """

    target_bytes: int = 8 << 10
    header_bytes: int = 32 << 10
    body_bytes: int = 64 << 20
    decompressed_bytes: int = 256 << 20
    tensors: int = 256
    rank: int = 32
    connections: int = 4096
    pipelined: int = 64
    header_seconds: float = 10.0
    body_seconds: float = 60.0
    idle_seconds: float = 75.0
    write_seconds: float = 30.0

"""gzip and deflate, both ways, within a bound."""

from __future__ import annotations

import zlib

from narrowcast.serving.http.message import Request, Response
from narrowcast.serving.refusals import Refusal

__all__ = ["compress", "decompress"]

#: Window sizes of zlib that stand for containers: 15 + 16 is gzip, 15 is zlib, which HTTP calls deflate (RFC 9110, 8.4.1).
_WINDOWS = {b"gzip": 31, b"x-gzip": 31, b"deflate": 15}
#: Some clients send deflate without the zlib container, as HTTP never meant it.
_BARE_DEFLATE = -15
_CHUNK = 1 << 20


def decompress(encoding: bytes, body: bytes, limit: int) -> bytes:
    """Return a body as it was before its content encodings.

    Args:
        encoding: The header Content-Encoding.
        body: What was sent.
        limit: Bytes that the result may have; no more than that is ever held.

    Raises:
        Refusal: An encoding is unknown (415), the body is not of that encoding (400), or too large (413).
    """
    names = [name.strip().lower() for name in encoding.split(b",") if name.strip()]
    if len(names) > 1:
        raise Refusal(415, "more than one content encoding; allowed: gzip or deflate or none")
    for name in names:
        if name == b"identity":
            continue
        if name not in _WINDOWS:
            raise Refusal(415, f"content encoding {name.decode('latin-1')!r} is unknown; allowed: gzip, deflate")
        body = _inflate(name, body, limit)
    return body


def _inflate(name: bytes, body: bytes, limit: int) -> bytes:
    window = _WINDOWS[name]
    if name == b"deflate" and not _has_zlib_header(body):
        window = _BARE_DEFLATE
    stream = zlib.decompressobj(window)
    parts: list[bytes] = []
    size, rest = 0, body
    try:
        while not stream.eof:
            part = stream.decompress(rest, min(_CHUNK, limit + 1 - size))
            if not part and not stream.eof and not stream.unconsumed_tail:
                raise Refusal(400, f"the body ends in the middle of its {name.decode()} data")
            parts.append(part)
            size, rest = size + len(part), stream.unconsumed_tail
            if size > limit:
                raise Refusal(413, f"the body is larger than {limit} bytes after decompression")
    except zlib.error as error:
        raise Refusal(400, f"the body is not {name.decode()} data: {error}") from error
    if stream.unused_data:
        raise Refusal(400, f"bytes follow the {name.decode()} data in the body")
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _has_zlib_header(body: bytes) -> bool:
    """Whether the first two bytes are those of RFC 1950: method 8, and a check that makes them a multiple of 31."""
    return len(body) >= 2 and body[0] & 0x0F == 8 and (body[0] << 8 | body[1]) % 31 == 0


def compress(request: Request, response: Response) -> Response:
    """Return an answer compressed as the client asked, where it asked."""
    accepted = request.headers.get(b"accept-encoding")
    if accepted is None or not response.body:
        return response
    name = _preferred(accepted)
    if name is None:
        return response
    stream = zlib.compressobj(zlib.Z_BEST_SPEED, zlib.DEFLATED, _WINDOWS[name])
    body = b"".join([*(stream.compress(part) for part in response.body), stream.flush()])
    headers = (*response.headers, (b"Content-Encoding", name), (b"Vary", b"Accept-Encoding"))
    return Response(response.status, (body,), response.content_type, headers, response.close)


def _preferred(accepted: bytes) -> bytes | None:
    """Return gzip or deflate, whichever the header weighs more, or None where it has neither."""
    weights: dict[bytes, float] = {}
    for item in accepted.lower().split(b","):
        name, _, parameters = item.partition(b";")
        quality = parameters.strip().removeprefix(b"q=")
        try:
            weights[name.strip()] = float(quality) if quality else 1.0
        except ValueError:
            weights[name.strip()] = 0.0
    known = [name for name in (b"gzip", b"deflate") if weights.get(name, 0.0) > 0]
    return max(known, key=lambda name: weights[name], default=None)

"""Where a server is."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import Literal, cast
from urllib.parse import urlsplit

from narrowcast.errors import UserError

__all__ = ["Target", "read_target"]

_PORTS = {"http": 80, "grpc": 8001}


@dataclass(frozen=True)
class Target:
    """A server.

    Attributes:
        scheme: How it is talked to.
        host: Name or address.
        port: TCP port.
        prefix: What stands before ``/v2`` in paths: empty, unless the server is behind a proxy that says so.
    """

    scheme: Literal["http", "grpc"]
    host: str
    port: int
    prefix: str = ""

    @property
    def authority(self) -> str:
        """Host and port, as a header or a channel takes them."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def local(self) -> bool:
        """Whether it is on this machine, as far as its address says."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def __str__(self) -> str:
        return f"{self.scheme}://{self.authority}{self.prefix}"


def read_target(url: str) -> Target:
    """Return the server that a URL names.

    Raises:
        UserError: It names none, or one that is talked to otherwise.
    """
    refusal = UserError(f"server {url!r} cannot be read", allowed="http://HOST:PORT or grpc://HOST:PORT")
    try:
        parts = urlsplit(url)
        port = parts.port
        (parts.hostname or "").encode("idna")  # as the resolver will
    except ValueError:
        raise refusal from None
    if parts.scheme not in _PORTS or not parts.hostname or parts.query or parts.fragment:
        raise refusal
    scheme = cast(Literal["http", "grpc"], parts.scheme)
    return Target(scheme, parts.hostname, port or _PORTS[scheme], parts.path.rstrip("/"))

"""Where a server is."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field
from typing import Any, Literal, cast
from urllib.parse import urlsplit

from narrowcast.errors import UserError
from narrowcast.load.access import Access

__all__ = ["Target", "read_target"]

#: Names of gRPC's metadata with values that are text (gRPC over HTTP/2, "Custom-Metadata").
_METADATA = re.compile(r"[0-9a-z_.-]+(?<!-bin)")
_PORTS = {"http": 80, "https": 443, "grpc": 8001, "grpcs": 443}

Scheme = Literal["http", "https", "grpc", "grpcs"]


@dataclass(frozen=True)
class Target:
    """A server.

    Attributes:
        scheme: How it is talked to; with an ``s`` at the end, over TLS.
        host: Name or address.
        port: TCP port.
        prefix: What stands before ``/v2`` in paths: empty, unless the server is behind a proxy that says so.
        access: What is needed to be let in.
    """

    scheme: Scheme
    host: str
    port: int
    prefix: str = ""
    access: Access = field(default_factory=Access)

    @classmethod
    def of(cls, document: dict[str, Any]) -> Target:
        """Return the target that `document` has described."""
        fields: dict[str, Any] = document | {"access": Access.of(document["access"])}
        return cls(**fields)

    def document(self) -> dict[str, Any]:
        """Return it in the types of JSON, secrets included, for another process."""
        return vars(self) | {"access": self.access.document()}

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The headers as gRPC takes them."""
        return tuple((name.lower(), value) for name, value in self.access.others)

    @property
    def grpc(self) -> bool:
        """Whether it is talked to over gRPC."""
        return self.scheme.startswith("grpc")

    @property
    def secured(self) -> bool:
        """Whether it is talked to over TLS."""
        return self.scheme.endswith("s")

    @property
    def name(self) -> str:
        """What it is called in requests."""
        return self.access.host or self.authority

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


def read_target(url: str, access: Access | None = None) -> Target:
    """Return the server that a URL names.

    Args:
        url: Where it is.
        access: What is needed to be let in.

    Raises:
        UserError: It names none, or one that is talked to otherwise, or not over the TLS that is asked for.
    """
    refusal = UserError(
        f"server {url!r} cannot be read",
        allowed="http://HOST:PORT or grpc://HOST:PORT, and https:// or grpcs:// over TLS",
    )
    try:
        parts = urlsplit(url)
        port = parts.port
        (parts.hostname or "").encode("idna")  # as the resolver will
    except ValueError:
        raise refusal from None
    if parts.username is not None or parts.password is not None:
        raise UserError(
            f"server {parts.hostname} is named together with a password, which reports would show",
            next_step='say it apart: --header "Authorization: ..."',
        )
    if parts.scheme not in _PORTS or not parts.hostname or parts.query or parts.fragment:
        raise refusal
    scheme = cast(Scheme, parts.scheme)
    target = Target(scheme, parts.hostname, port or _PORTS[scheme], parts.path.rstrip("/"), access or Access())
    if target.grpc:
        _check_grpc(target)
    if not target.secured and target.access != Access(headers=target.access.headers):
        raise UserError(
            f"{target} is talked to without TLS, about which --cacert, --cert and --insecure say something",
            next_step=f"say {scheme}s://, or leave them out",
        )
    return target


def _check_grpc(target: Target) -> None:
    """Make sure that gRPC can do what is asked.

    Raises:
        UserError: It cannot.
    """
    if target.prefix:
        raise UserError(
            f"server {target} is named with a path, which gRPC has not", next_step=f"leave {target.prefix} out"
        )
    for name, _ in target.metadata:
        if not _METADATA.fullmatch(name):
            raise UserError(
                f"header {name!r} cannot be sent over gRPC", allowed="letters, digits, _, . and -, not -bin"
            )

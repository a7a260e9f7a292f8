"""Channels of gRPC: options, and trust as TLS over HTTP has it."""

from __future__ import annotations

import functools
import ssl
from pathlib import Path
from typing import Any

import grpc

from narrowcast.load.target import Target
from narrowcast.load.tls import connected, tls_error

__all__ = ["grpc_channel"]

#: Messages of any size, and a connection of its own for each channel.
_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),
]


def grpc_channel(target: Target, asynchronous: bool) -> Any:
    """Return a channel to a server.

    Args:
        target: The server.
        asynchronous: Whether it is for asyncio.

    Raises:
        UserError: Nobody answers to a question for a certificate.
    """
    make = grpc.aio if asynchronous else grpc
    options = list(_OPTIONS)
    if target.access.host:
        options.append(("grpc.default_authority", target.access.host))
    if not target.secured:
        return make.insecure_channel(target.authority, options=options)
    access = target.access
    if access.checked:
        roots, name = _authorities(access.authorities), ""
    else:
        roots, name = _shown(target)
    if name:
        options.append(("grpc.ssl_target_name_override", name))
    own = [Path(file).read_bytes() if file else None for file in (access.key or access.certificate, access.certificate)]
    return make.secure_channel(target.authority, grpc.ssl_channel_credentials(roots, *own), options=options)


@functools.cache
def _authorities(file: str) -> bytes:
    """Return the certificates of a file, or of the system; gRPC would bring its own list instead of the latter."""
    if file:
        return Path(file).read_bytes()
    paths = ssl.get_default_verify_paths()
    if paths.cafile:
        return Path(paths.cafile).read_bytes()
    folder = Path(paths.capath or "/nonexistent")
    return b"\n".join(sorted({one.read_bytes() for one in folder.glob("*.[0-9]")}))


def _shown(target: Target) -> tuple[bytes, str]:
    """Return the certificate that a server shows, and a name in it.

    gRPC checks certificates always, so that one that is not to be checked is made the one that is trusted.

    Raises:
        UserError: Nobody answers, or the certificate is none that gRPC could take.
    """
    try:
        with connected(target, target.access.context()) as connection:
            shown = ssl.DER_cert_to_PEM_cert(connection.getpeercert(binary_form=True) or b"")
        context = target.access.context()
        context.verify_mode = ssl.CERT_REQUIRED
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        context.load_verify_locations(cadata=shown)
        with connected(target, context) as connection:
            known: Any = connection.getpeercert()  # which says nothing of certificates that were not verified
    except OSError as error:
        raise tls_error(target, error) from error
    names = [name for kind, name in known.get("subjectAltName", ()) if kind in ("DNS", "IP Address")]
    names += [value for part in known.get("subject", ()) for field, value in part if field == "commonName"]
    return shown.encode(), names[0].replace("*", "any") if names else ""

"""TLS as far as it has to be looked at before a load: whether a server proves who it is, and what is wrong if not."""

from __future__ import annotations

import socket
import ssl

from narrowcast.errors import UserError
from narrowcast.load.target import Target

__all__ = ["check_handshake", "connected", "tls_error"]

#: Seconds that a server has for a handshake, and after it for what it may have against us.
_PATIENCE, _MOMENT = 30.0, 1.0


def check_handshake(target: Target) -> None:
    """Make a TLS connection and close it again, so that what is wrong with it is said in words.

    Raises:
        UserError: Nobody answers, or who answers cannot prove to be the server, wants proof, or speaks something else.
    """
    context = target.access.context()
    if target.grpc:
        context.set_alpn_protocols(["h2"])
    try:
        with connected(target, context) as connection:
            if target.grpc:
                if connection.selected_alpn_protocol() != "h2":
                    raise UserError(f"what answers at {target} does not speak gRPC", next_step="check port and scheme")
                connection.settimeout(_MOMENT)
                # A refusal of our certificate comes after the handshake, where settings would come.
                if not connection.recv(1):
                    raise ConnectionResetError("it came to its end after the handshake")
    except TimeoutError:
        return
    except OSError as error:
        raise tls_error(target, error) from error


def tls_error(target: Target, error: OSError) -> UserError:
    """Return what an error of a TLS connection means for somebody who named a URL."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return UserError(
            f"the server at {target} cannot prove who it is: {error.verify_message or error.reason}",
            next_step="name who vouches for it: --cacert FILE; or go without proof: --insecure",
        )
    reason = (error.reason or "").lower().replace("_", " ") if isinstance(error, ssl.SSLError) else ""
    if "certificate" in reason or "unknown ca" in reason:
        return UserError(
            f"the server at {target} wants to know who asks: {reason}",
            next_step="show a certificate: --cert FILE --key FILE",
        )
    if isinstance(error, ssl.SSLError):
        plain = "grpc" if target.grpc else "http"
        return UserError(
            f"there is no TLS connection to {target}: {reason or error.strerror or error}",
            next_step=f"check the port; without TLS, say {plain}://",
        )
    if isinstance(error, ConnectionError) and not isinstance(error, ConnectionRefusedError):
        return UserError(
            f"the server at {target} ended the connection: {error.strerror or error}",
            next_step="it may want to know who asks: --cert FILE --key FILE",
        )
    return UserError(
        f"nobody answers at {target}: {error.strerror or error}", next_step="start it, or name another URL"
    )


def connected(target: Target, context: ssl.SSLContext) -> ssl.SSLSocket:
    """Return a TLS connection to a server.

    Raises:
        OSError: Nobody answers, or the handshake fails.
    """
    plain = socket.create_connection((target.host, target.port), timeout=_PATIENCE)
    try:
        return context.wrap_socket(plain, server_hostname=target.host)
    except BaseException:
        plain.close()
        raise

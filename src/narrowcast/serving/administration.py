"""Who may change what is served, and how: one rule for all transports."""

from __future__ import annotations

import hmac

from narrowcast.errors import ConfigError
from narrowcast.serving.refusals import Refusal

__all__ = ["check_administrator", "check_load_parameters", "check_token"]


def check_token(token: str) -> None:
    """Check that a token can be sent in a header as it is.

    Raises:
        ConfigError: It cannot, or is empty.
    """
    if not token or not token.isprintable() or token != token.strip():
        raise ConfigError(
            "the administrators' token is empty, begins or ends with spaces, or has characters that do not print",
            next_step="give the token alone, without the end of its line",
        )


def check_administrator(token: str | None, authorization: bytes) -> None:
    """Check that a client is an administrator.

    Args:
        token: What administrators send; None or nothing where there are none.
        authorization: What this client sent as ``authorization``, in a header or in metadata; empty for nothing.

    Raises:
        Refusal: It is none (401), or nobody is (403).
    """
    if not token:
        raise Refusal(403, "administration is off; start the server with a token to turn it on")
    scheme, _, sent = authorization.partition(b" ")
    expected = token.encode(errors="surrogateescape")
    if scheme.lower() != b"bearer" or not hmac.compare_digest(sent, expected):
        raise Refusal(401, "administration needs 'authorization: Bearer TOKEN' with the server's token")


def check_load_parameters(parameters: object) -> None:
    """Check that a load asks for nothing that is not done.

    Raises:
        Refusal: It brings a configuration or files (501).
    """
    if parameters:
        raise Refusal(501, "a load takes no parameters here: how models are served is set when the server starts")

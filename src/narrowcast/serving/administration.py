"""Who may change what is served, and how: one rule for all transports."""

from __future__ import annotations

import hmac

from narrowcast.serving.refusals import Refusal

__all__ = ["check_administrator", "check_load_parameters"]


def check_administrator(token: str | None, authorization: bytes) -> None:
    """Check that a client is an administrator.

    Args:
        token: What administrators send, or None where there are none.
        authorization: What this client sent as ``authorization``, in a header or in metadata; empty for nothing.

    Raises:
        Refusal: It is none (401), or nobody is (403).
    """
    if token is None:
        raise Refusal(403, "administration is off; start the server with a token to turn it on")
    if not hmac.compare_digest(authorization, b"Bearer " + token.encode()):
        raise Refusal(401, "administration needs 'authorization: Bearer TOKEN' with the server's token")


def check_load_parameters(parameters: object) -> None:
    """Check that a load asks for nothing that is not done.

    Raises:
        Refusal: It brings a configuration or files (501).
    """
    if parameters:
        raise Refusal(501, "a load takes no parameters here: how models are served is set when the server starts")

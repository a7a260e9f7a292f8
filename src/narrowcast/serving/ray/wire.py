"""What goes between the ingress and the replicas, and how the ingress asks them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from narrowcast.serving.http.message import Request, Response

__all__ = ["Call", "CallAnswer", "Remote"]


@dataclass(frozen=True, slots=True)
class Call:
    """A gRPC call with one request message, as bytes."""

    method: str
    message: bytes
    metadata: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class CallAnswer:
    """The answer to a call: a message, or a status with its details.

    Attributes:
        message: The response; empty where the call failed.
        code: Name of the status; empty where it succeeded.
        details: What is wrong.
        trailing: Metadata behind the answer.
    """

    message: bytes = b""
    code: str = ""
    details: str = ""
    trailing: tuple[tuple[str, str], ...] = ()


class Remote(Protocol):
    """The replicas of one model version."""

    async def ask(self, request: Request) -> Response:
        """Return what one of them answers.

        Raises:
            Refusal: None can be reached (503).
        """
        ...

    async def ask_all(self, request: Request) -> list[Response]:
        """Return what each of them answers that runs."""
        ...

    async def call(self, call: Call) -> CallAnswer:
        """Return what one of them answers to a gRPC call.

        Raises:
            Refusal: None can be reached (503).
        """
        ...

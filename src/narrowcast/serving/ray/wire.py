"""What goes between the ingress, the repository's keeper and the replicas, and how they ask each other.

All of it is pickled by Ray on its way; exceptions are not, because not all of ours survive that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from narrowcast.serving.http.message import Request, Response
from narrowcast.serving.refusals import Refusal
from narrowcast.serving.scheduling.statistics import Statistics
from narrowcast.serving.signature import Signature
from narrowcast.serving.traffic import Traffic

__all__ = ["Call", "CallAnswer", "Keeping", "Refused", "Remote", "Report", "RoutedModel", "Table"]


@dataclass(frozen=True, slots=True)
class Call:
    """A gRPC call with one request message, as bytes.

    Attributes:
        method: Name of the method.
        message: The request.
        metadata: What was sent with it.
        remaining: Seconds until its deadline, when it came; None for no deadline.
    """

    method: str
    message: bytes
    metadata: tuple[tuple[str, str], ...] = ()
    remaining: float | None = None


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


@dataclass(frozen=True, slots=True)
class Refused:
    """A refusal on its way from one process to another."""

    status: int
    message: str
    retry_after: float | None = None

    @classmethod
    def of(cls, refusal: Refusal) -> Refused:
        """Return a refusal as it travels."""
        return cls(refusal.status, refusal.message, refusal.retry_after)

    def refusal(self) -> Refusal:
        """Return it as it is raised."""
        return Refusal(self.status, self.message, retry_after=self.retry_after)


@dataclass(frozen=True, slots=True)
class Report:
    """How a replica is.

    Attributes:
        replica: What Ray calls it; no two ever have the same name.
        statistics: What it has counted.
        pending: Requests that wait in it.
        running: Batches that it runs.
    """

    replica: str
    statistics: Statistics
    pending: int = 0
    running: int = 0


class Remote(Protocol):
    """The replicas of one deployment."""

    @property
    def key(self) -> str:
        """Name of the deployment; no other ever had it."""
        ...

    async def ask(self, request: Request) -> Response:
        """Return what one of them answers.

        Raises:
            Refusal: None can be reached, or it died (503).
        """
        ...

    async def call(self, call: Call) -> CallAnswer:
        """Return what one of them answers to a gRPC call.

        Raises:
            Refusal: None can be reached, or it died (503).
        """
        ...

    async def signature(self) -> Signature:
        """Return what the model takes and gives.

        Raises:
            Refusal: None can be reached, or it died (503).
        """
        ...

    async def reports(self) -> list[Report]:
        """Return how each of them is that can be reached."""
        ...

    async def close(self) -> None:
        """Let go of what asking them takes here; they themselves go on."""
        ...


@dataclass(frozen=True)
class RoutedModel:
    """A model as the ingress knows it.

    Attributes:
        traffic: Versions that answer requests which name none.
        versions: Versions that are loaded.
    """

    traffic: Traffic
    versions: Mapping[int, Remote]


@dataclass(frozen=True)
class Table:
    """Who answers what.

    Attributes:
        revision: Grows with each change, and from one keeper to the next.
        models: All models that answer requests, by name.
    """

    revision: int = 0
    models: Mapping[str, RoutedModel] = field(default_factory=dict[str, RoutedModel])


class Keeping(Protocol):
    """The keeper of the repository, as the ingress reaches it.

    Where it cannot be reached, or has not loaded the models yet, all that it is asked is refused (503).
    """

    async def ask(self, request: Request) -> Response:
        """Return the answer to a request of the REST protocol that is no inference.

        Raises:
            Refusal: Nobody can answer now (503).
        """
        ...

    async def call(self, call: Call) -> CallAnswer:
        """Return the answer to a gRPC call that is no inference.

        Raises:
            Refusal: Nobody can answer now (503).
        """
        ...

    async def wake(self, name: str, version: str) -> Table:
        """Return the newest table, with a version that is loaded first if need be; empty for what the traffic draws.

        Raises:
            Refusal: There is no such model or version (404), or it cannot be loaded (503, 504, 507).
        """
        ...

    async def follow(self, who: str, applied: int, settled: int) -> Table | None:
        """Return a newer table as soon as there is one, or None after a while.

        Args:
            who: The ingress replica.
            applied: Revision of the table that it goes by.
            settled: No request of it is under way that went by an older table than this.

        Raises:
            Refusal: The keeper cannot be reached (503).
        """
        ...

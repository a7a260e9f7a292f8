"""A model of the catalogue: its versions, which of them answer, and what answered before."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from narrowcast.errors import NarrowcastError
from narrowcast.serving.hosting import Hosting, ServedVersion
from narrowcast.serving.refusals import ModelBusyError, Refusal
from narrowcast.serving.state import ModelState
from narrowcast.serving.traffic import Traffic
from narrowcast.serving.workers.sources import Source

__all__ = ["Change", "IndexEntry", "Model"]

_log = logging.getLogger(__name__)
#: Changes that can be taken back.
_REMEMBERED = 32
#: Waits before a version that could not be loaded is tried for another request: doubled each time, up to the longest.
_FIRST_BACKOFF = 0.1
_LONGEST_BACKOFF = 30.0


@dataclass(frozen=True)
class IndexEntry:
    """One line of the repository's index; states as Triton calls them."""

    name: str
    version: str
    state: str
    reason: str = ""


@dataclass(frozen=True)
class Change:
    """What a change has led to.

    Attributes:
        traffic: Share of each version in the requests that name none; empty where the model is unloaded.
        forgotten: Why a restart will not remember it; empty where it will.
    """

    traffic: dict[str, float]
    forgotten: str = ""


@dataclass(frozen=True)
class _Failure:
    """A version that could not be loaded: how often, why, and until when nobody tries again."""

    count: int
    error: NarrowcastError
    until: float


@dataclass(slots=True)
class Model:
    """A model by its versions.

    Attributes:
        hosting: How it is run.
        sources: Versions that are served: loaded, or to be loaded at a request.
        loaded: Those that are loaded.
        traffic: Versions that answer requests which name none; None where the model is not served.
        chosen: Whether somebody chose them; else they are the newest.
        history: Traffic before, the oldest first.
        states: State and reason of versions that are not loaded.
        failures: Versions whose last load for a request failed.
        waiting: Requests that wait for a version to be loaded, by version.
        lock: Held while versions change.
    """

    hosting: Hosting
    sources: dict[int, Source] = field(default_factory=dict[int, Source])
    loaded: dict[int, ServedVersion] = field(default_factory=dict[int, ServedVersion])
    traffic: Traffic | None = None
    chosen: bool = False
    history: list[Traffic] = field(default_factory=list[Traffic])
    states: dict[int, tuple[str, str]] = field(default_factory=dict[int, tuple[str, str]])
    failures: dict[int, _Failure] = field(default_factory=dict[int, _Failure])
    waiting: dict[int, int] = field(default_factory=dict[int, int])
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @asynccontextmanager
    async def turn(self, name: str, patience: float) -> AsyncGenerator[None]:
        """Hold the model for a change when nobody else does.

        Args:
            name: The model.
            patience: Seconds to wait for that.

        Raises:
            ModelBusyError: Somebody else still does then.
        """
        try:
            async with asyncio.timeout(patience):
                await self.lock.acquire()
        except TimeoutError:
            loading = [str(version) for version, (state, _) in sorted(self.states.items()) if state == "LOADING"]
            under_way = f": version {', '.join(loading)} is being loaded" if loading else ""
            raise ModelBusyError(
                f"model {name!r} is being changed by somebody else{under_way}; this change waited {patience:g} s and was "
                "not made",
                next_step="ask again later; a load that does not end is broken off (serve --load-timeout)",
            ) from None
        try:
            yield
        finally:
            self.lock.release()

    @property
    def shares(self) -> dict[str, float]:
        """Share of each version in the requests that name none; empty where the model is not served."""
        return {} if self.traffic is None else {str(version): share for version, share in self.traffic.shares.items()}

    def entries(self, name: str, found: Iterable[int]) -> list[IndexEntry]:
        """Return the lines of the index about the model, those versions included that were found and are not served."""
        entries: list[IndexEntry] = []
        for version in sorted({*found, *self.sources, *self.states}):
            state, reason = self.states.get(version, ("UNAVAILABLE", "not loaded"))
            if version in self.loaded:
                alive = self.loaded[version].scheduler.workers_alive
                state, reason = ("READY", "") if alive else ("UNAVAILABLE", "no worker is alive")
            entries.append(IndexEntry(name, str(version), state, reason))
        return entries

    def direct(self, traffic: Traffic, *, chosen: bool, back: bool = False) -> None:
        """Let other versions answer; what answered before is put into the history, or the way back is taken out of it."""
        if back:
            self.history.pop()
        elif self.traffic is not None and self.traffic != traffic:
            self.history = [*self.history, self.traffic][-_REMEMBERED:]
        self.traffic, self.chosen = traffic, chosen

    def state(self) -> ModelState:
        """Return what a restart has to know."""
        kept = dict(self.traffic.weights) if self.traffic is not None and self.chosen else None
        return ModelState(traffic=kept, history=tuple(dict(traffic.weights) for traffic in self.history))

    def restore(self, name: str, before: ModelState, found: Mapping[int, Source]) -> Traffic | None:
        """Take the history up, and return the traffic that was chosen before the server was started, if it can be had."""
        self.history = [Traffic.of(weights) for weights in before.history]
        if before.traffic is None:
            return None
        gone = [version for version in before.traffic if version not in found]
        if gone:
            _log.warning(
                "model %s: version %d answered before and is no longer there; the newest answers", name, gone[0]
            )
            return None
        return Traffic.of(before.traffic)

    def before(self, name: str) -> Traffic:
        """Return what answered before.

        Raises:
            Refusal: Nothing else has (400).
        """
        if not self.history:
            raise Refusal(400, f"model {name!r} has no version to go back to")
        return self.history[-1]

    def unsplit(self, name: str) -> Traffic:
        """Return the traffic before all splits that are in force.

        Raises:
            Refusal: There is none (400).
        """
        alone = next((traffic for traffic in reversed(self.history) if len(traffic.versions) == 1), None)
        if self.traffic is None or len(self.traffic.versions) == 1 or alone is None:
            raise Refusal(400, f"model {name!r} has no split that could end")
        return alone

    def failed(self, version: int, error: NarrowcastError) -> None:
        """Note that a version could not be loaded for a request."""
        before = self.failures.get(version)
        count = 1 if before is None else before.count + 1
        pause = min(_LONGEST_BACKOFF, _FIRST_BACKOFF * 2 ** min(count, 16))
        self.failures[version] = _Failure(count, error, time.monotonic() + pause)

    def check_backoff(self, version: int) -> None:
        """Make sure that it is worth while to try a version now.

        Raises:
            NarrowcastError: It failed a moment ago; the same again.
        """
        failure = self.failures.get(version)
        if failure is not None and time.monotonic() < failure.until:
            raise failure.error.with_traceback(None)  # it would grow with each time that it is raised

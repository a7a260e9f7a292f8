"""How a process that fails alone tells the others, which would wait in an exchange until its timeout.

The one that fails leaves a line in the store that the processes met in, and waits a moment until all have read it. In each of
the others a thread asks the store for it a few times a second: the training step knows nothing of it, and no device waits.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import NamedTuple, Self

import torch.distributed as dist

from narrowcast.errors import NarrowcastError, TrainingError

__all__ = ["Alarm", "Failure"]

_log = logging.getLogger(__name__)
_PERIOD_S = 0.25  # from one look into the store to the next
_HEARD_S = 5.0  # that a process which fails waits for the others to hear of it
_ANSWER_S = 10.0  # that the store may take to answer
_GRACE_S = 1.0  # in which a process that heard may end by itself, as where all fail alike


class Failure(NamedTuple):
    """What happened on one process alone.

    Attributes:
        rank: Which.
        what: What happened.
        allowed: What would have been allowed, if that is known.
        next_step: What to do.
    """

    rank: int
    what: str
    allowed: str = ""
    next_step: str = "mend that, then start all processes again; --resume goes on from the last checkpoint"

    @classmethod
    def of(cls, rank: int, error: Exception) -> Self:
        """Return what an error says."""
        if isinstance(error, NarrowcastError):
            return cls(rank, error.what, error.allowed, error.next_step or cls._field_defaults["next_step"])
        said = str(error).strip().splitlines()
        return cls(rank, f"{type(error).__name__}: {said[0]}" if said else type(error).__name__)

    def error(self) -> TrainingError:
        """Return it as an error, the same on all processes."""
        return TrainingError(f"rank {self.rank} failed: {self.what}", allowed=self.allowed, next_step=self.next_step)


class Alarm:
    """Tells the other processes that this one failed, and hears it of them.

    Args:
        store: Where the processes met, under a prefix that no group before it had.
        rank: The number of this process.
        world: How many there are.
        wake: Called in a thread when another one has failed, and this one has not ended by itself: ends what it waits in.
    """

    def __init__(self, store: dist.Store, rank: int, world: int, wake: Callable[[], None]) -> None:
        self._store = store.clone()  # one for each thread
        self._listened = store.clone()
        for one in (self._store, self._listened):
            one.set_timeout(timedelta(seconds=_ANSWER_S))
        self._rank = rank
        self._world = world
        self._wake = wake
        self._failure: Failure | None = None
        self._heard = threading.Event()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="alarm", daemon=True)
        self._thread.start()

    def failure(self, *, wait: bool = False) -> Failure | None:
        """Return which process failed, and how; None if none has said so.

        Args:
            wait: Whether to wait a moment for it, as one who has just lost another process does.
        """
        if wait:
            self._heard.wait(2 * _PERIOD_S + _GRACE_S)
        return self._failure

    def ring(self, error: Exception) -> None:
        """Tell the others of an error, and wait a moment until they have heard; the first that tells is believed."""
        own = json.dumps(Failure.of(self._rank, error))
        try:
            if self._store.compare_set("failed", "", own).decode() != own:
                return
            limit = time.monotonic() + _HEARD_S
            while self._store.add("heard", 0) < self._world - 1 and time.monotonic() < limit:
                time.sleep(_PERIOD_S / 5)
        except RuntimeError as problem:  # who holds the store is gone
            _log.debug("the others were not told: %s", problem)

    def stop(self) -> None:
        """Listen no longer, and have nobody wait for it."""
        self._stopped.set()
        self._thread.join(2 * _ANSWER_S)

    def _listen(self) -> None:
        try:
            while not self._stopped.wait(_PERIOD_S):
                if self._listened.check(["failed"]):
                    self._failure = Failure(*json.loads(self._listened.get("failed")))
                    self._heard.set()
                    break
            if self._failure is None or self._failure.rank != self._rank:
                self._listened.add("heard", 1)
        except RuntimeError as problem:  # who holds the store is gone: the next exchange says so
            _log.debug("the alarm is out of order: %s", problem)
        if self._failure is not None and self._failure.rank != self._rank and not self._stopped.wait(_GRACE_S):
            self._wake()

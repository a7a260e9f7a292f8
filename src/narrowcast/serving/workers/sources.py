"""Where the models of workers come from, and how workers are made for them."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from narrowcast.artifacts.store import GRAPH
from narrowcast.serving.workers.base import LoadedModel, Worker
from narrowcast.serving.workers.inline import InlineWorker, ThreadWorker
from narrowcast.serving.workers.loading import open_artifact
from narrowcast.serving.workers.process import ProcessWorker

__all__ = ["ArtifactSource", "FunctionSource", "Placement", "Source"]


class Placement(StrEnum):
    """Where a model runs."""

    PROCESS = "process"
    THREAD = "thread"
    INLINE = "inline"


class Source(ABC):
    """A model that can be loaded any number of times."""

    @abstractmethod
    def worker(self, placement: Placement) -> Worker:
        """Return a worker that was not started."""

    @abstractmethod
    def size(self) -> int:
        """Return the bytes of memory that one worker takes at least, as far as that is known before it is started."""


@dataclass(frozen=True)
class ArtifactSource(Source):
    """The artifact in a folder."""

    folder: Path

    def size(self) -> int:
        try:
            return sum(path.stat().st_size for path in self.folder.glob(f"{GRAPH}*"))
        except OSError:  # whoever loads it says what is wrong with it
            return 0

    def worker(self, placement: Placement) -> Worker:
        if placement is Placement.PROCESS:
            return ProcessWorker(self.folder)
        load = functools.partial(open_artifact, self.folder)
        return InlineWorker(load) if placement is Placement.INLINE else ThreadWorker(load)


@dataclass(frozen=True)
class FunctionSource(Source):
    """A model that a Python function makes, for libraries; it stays in their process.

    Attributes:
        load: Makes the model.
        bytes: Memory that it takes, where that should be known before it is made.
    """

    load: Callable[[], LoadedModel]
    bytes: int = 0

    def size(self) -> int:
        return self.bytes

    def worker(self, placement: Placement) -> Worker:
        return InlineWorker(self.load) if placement is Placement.INLINE else ThreadWorker(self.load)

"""Where the models of workers come from, and how workers are made for them."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

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


@dataclass(frozen=True)
class ArtifactSource(Source):
    """The artifact in a folder."""

    folder: Path

    def worker(self, placement: Placement) -> Worker:
        if placement is Placement.PROCESS:
            return ProcessWorker(self.folder)
        load = functools.partial(open_artifact, self.folder)
        return InlineWorker(load) if placement is Placement.INLINE else ThreadWorker(load)


@dataclass(frozen=True)
class FunctionSource(Source):
    """A model that a Python function makes, for libraries; it stays in their process."""

    load: Callable[[], LoadedModel]

    def worker(self, placement: Placement) -> Worker:
        return InlineWorker(self.load) if placement is Placement.INLINE else ThreadWorker(self.load)

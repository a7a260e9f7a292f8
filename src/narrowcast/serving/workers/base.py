"""The boundary between the scheduler and what runs a model: one batch at a time, and an answer through a callback.

A worker may take the next batch while one runs, so that it need not wait for the server in between. That batch is no more
than laid ready: it can be taken back, and does not begin when its time is over.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from narrowcast.serving.signature import Signature, Tensors

__all__ = ["Batch", "Done", "LoadedModel", "Result", "Worker", "joined"]


@dataclass(slots=True)
class Batch:
    """Requests that run together.

    Attributes:
        parts: The inputs of each request; their shapes differ in the first axis alone.
        rows: Rows of all of them.
        before: When it is too late to begin, in nanoseconds of the monotonic clock, or None for never.
    """

    parts: Sequence[Tensors]
    rows: int
    before: int | None = None


@dataclass(slots=True)
class Result:
    """What became of a batch.

    Attributes:
        outputs: Outputs of all rows, by name; None where it failed.
        error: Why it failed.
        input_ns: Time that gathering and moving the inputs took.
        infer_ns: Time that the model took.
        output_ns: Time that moving the outputs took.
        began: Whether the model was asked; where it was not, there are neither outputs nor an error.
    """

    outputs: Tensors | None = None
    error: Exception | None = None
    input_ns: int = 0
    infer_ns: int = 0
    output_ns: int = 0
    began: bool = True


Done = Callable[[Result], None]


class LoadedModel(ABC):
    """A model in this process.

    Attributes:
        signature: What it takes and gives.
        size: Bytes of memory that it takes, or None where it does not know.
    """

    signature: Signature
    size: int | None = None

    @abstractmethod
    def run(self, inputs: Tensors) -> Tensors:
        """Return the outputs by name for inputs by name."""

    def close(self) -> None:  # noqa: B027  most models are freed with the last reference to them
        """Free what the model holds."""


def _nobody(worker: Worker) -> None:
    """Tell nobody: whoever comes later asks whether the worker is up."""


class Worker(ABC):
    """Runs one batch at a time."""

    signature: Signature
    #: Called when a worker that was down is up again, and when it goes down.
    on_up: Callable[[Worker], None] = staticmethod(_nobody)
    on_down: Callable[[Worker], None] = staticmethod(_nobody)

    @property
    def up(self) -> bool:
        """Whether it can run a batch now, once it was started."""
        return True

    @property
    def takes_ahead(self) -> bool:
        """Whether it takes a batch now while another runs."""
        return False

    @abstractmethod
    async def start(self) -> None:
        """Load the model.

        Raises:
            NarrowcastError: It cannot be loaded.
        """

    @abstractmethod
    def submit(self, batch: Batch, done: Done) -> None:
        """Run a batch; ``done`` is called in the event loop, perhaps before this returns."""

    def recall(self) -> bool:
        """Take back the batch that was submitted while another runs.

        Returns:
            Whether it has not begun: it never will then, and its ``done`` is not called. Otherwise it may run.
        """
        return False

    def memory(self) -> int | None:
        """Return the bytes of memory that end with the worker, or None where nobody knows; takes a while."""
        return None

    def abort(self) -> None:  # noqa: B027  what runs in the event loop cannot be ended from it
        """End the batch that runs, as far as that can be done; the worker is down until it can run others."""

    @abstractmethod
    async def close(self) -> None:
        """End the worker; no batch runs."""


def joined(batch: Batch) -> Tensors:
    """Return the inputs of all requests, one behind the other along the first axis; a copy where there are several."""
    if len(batch.parts) == 1:
        # Bytes behind a JSON header may begin anywhere, and a runtime's vector loads need elements in their places.
        return {name: array if array.flags.aligned else array.copy() for name, array in batch.parts[0].items()}
    first = batch.parts[0]
    return {name: np.concatenate([part[name] for part in batch.parts]) for name in first}

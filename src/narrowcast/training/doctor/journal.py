"""What a watch has seen so far, in memory and on disk; a run that is resumed goes on in the same record."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from narrowcast.training.doctor import record, resuming
from narrowcast.training.doctor.histories import Histories, format_advice, scale_advice
from narrowcast.training.doctor.values import Event, Reading, Record, Setting, Summary, Verdict
from narrowcast.training.doctor.verdict import verdict
from narrowcast.training.writing import written

__all__ = ["Journal"]

_log = logging.getLogger(__name__)
_WRITES = 10  # calls of save() from one write of the histograms to the next


class Journal:
    """Keeps readings, events and histograms, and writes them to a folder if there is one.

    Args:
        setting: How the doctor is set up.
        folder: Where the record goes; what it holds from before ``step`` is taken up, and what came later goes.
        step: Updates done.

    Attributes:
        events: In order.
        readings: One a step.
        histories: The histograms.

    Raises:
        ArtifactError: The folder holds a damaged record.
        OutputError: The folder cannot be written.
    """

    def __init__(self, setting: Setting, folder: Path | None, step: int) -> None:
        self.events: list[Event] = []
        self.readings: list[Reading] = []
        self.histories = Histories()
        self._setting = setting
        self._folder = folder
        self._unwritten: list[Reading | Event] = []
        self._saves = 0
        if folder is not None:
            with self._written():
                if resuming.rewind(folder, step):
                    self._take_up(record.read(folder), step)
                record.append(folder, [setting])

    def _written(self) -> AbstractContextManager[None]:
        """Return the context in which the folder is written: what the system says of it becomes an error that names it."""
        return written(f"the doctor's record in {self._folder}")

    def _take_up(self, before: Record, step: int) -> None:
        self.events = list(before.events)
        self.readings = list(before.readings)
        for series in before.series:
            self.histories.take_up(series, step)

    def keep(self, reading: Reading) -> None:
        """Keep what a step was in numbers."""
        self.readings.append(reading)
        if self._folder is not None:
            self._unwritten.append(reading)

    def note(self, events: Sequence[Event]) -> None:
        """Note what happened, in the log too."""
        for event in events:
            self.events.append(event)
            if self._folder is not None:
                self._unwritten.append(event)
            _log.log(logging.INFO if event.normal else logging.WARNING, "%s", event.sentence)

    def series(self) -> tuple[record.Series, ...]:
        """Return all histograms, in the order of the layers."""
        return self.histories.series([layer.name for layer in self._setting.layers])

    def summary(self) -> Summary:
        """Return the verdict and the advice."""
        series, formats = self.series(), self._setting.formats
        wanted = self._setting.compute == "fp16" or "fp16" in formats
        return Summary(
            verdict=self._verdict(),
            scale=scale_advice(series) if wanted else None,
            formats=format_advice(series, formats),
        )

    def _verdict(self) -> Verdict:
        """Return the answer, which says what part of the run it does not know."""
        steps = {one.step for one in self.readings if not one.skipped}
        found = verdict(self.events, len(steps))
        run = max(steps, default=-1) + 1
        if len(steps) == run:
            return found
        first = next(step for step in range(run) if step not in steps)
        onwards = next(step for step in range(first, run) if step in steps)
        unknown = (
            f"Of the run's {run} steps {run - len(steps)} have no record: it lacks those from {first} on and goes on at step "
            f"{onwards}; they were trained without the doctor, or what it wrote was lost."
        )
        return found.model_copy(update={"sentences": (*found.sentences, unknown)})

    def record(self) -> Record:
        """Return all of it, as :func:`narrowcast.training.doctor.record.read` would."""
        return Record(self._setting, tuple(self.readings), tuple(self.events), self.series(), self.summary())

    def save(self) -> None:
        """Append what is new to the folder, if there is one; every tenth time, write all.

        Raises:
            OutputError: The folder cannot be written.
        """
        if self._folder is None:
            return
        self._saves += 1
        if self._saves % _WRITES == 0:
            self.write()
        else:
            with self._written():
                record.append(self._folder, self._unwritten)
            self._unwritten = []

    def write(self) -> Summary:
        """Write all to the folder, if there is one, and return the summary.

        Raises:
            OutputError: The folder cannot be written.
        """
        summary = self.summary()
        if self._folder is not None:
            with self._written():
                record.append(self._folder, [*self._unwritten, summary])
                record.write_series(self._folder, self.series())
            self._unwritten = []
        return summary

    def mark(self, step: int, keep: int) -> None:
        """Write all to the folder, if there is one, as what a checkpoint goes on from.

        Args:
            step: Updates done, as the checkpoint counts them.
            keep: How many checkpoints can be gone on from.

        Raises:
            OutputError: The folder cannot be written.
        """
        if self._folder is not None:
            self.write()
            with self._written():
                resuming.mark(self._folder, step, keep)

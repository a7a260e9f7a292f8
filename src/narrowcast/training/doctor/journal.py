"""What a watch has seen so far, in memory and on disk; a run that is resumed goes on in the same record."""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from narrowcast.training.doctor import record, resuming
from narrowcast.training.doctor.histories import Histories, format_advice, scale_advice
from narrowcast.training.doctor.values import Event, Reading, Record, Setting, Summary, Verdict
from narrowcast.training.doctor.verdict import Tally
from narrowcast.training.writing import written

__all__ = ["Journal"]

_log = logging.getLogger(__name__)
_KEPT = 4096  # readings, and events, that are kept in memory: the latest
_WRITES = 10  # calls of save() from one write of the histograms to the next


class Journal:
    """Keeps readings, events and histograms, and writes them to a folder if there is one.

    Args:
        setting: How the doctor is set up.
        folder: Where the record goes; what it holds from before ``step`` is taken up, and what came later goes.
        step: Updates done.

    Attributes:
        events: In order, the latest 4096; the folder holds all of them.
        readings: One a step, the latest 4096; the folder holds all of them.
        histories: The histograms.

    Raises:
        ArtifactError: The folder holds a damaged record.
        OutputError: The folder cannot be written.
    """

    def __init__(self, setting: Setting, folder: Path | None, step: int) -> None:
        self.events: deque[Event] = deque(maxlen=_KEPT)
        self.readings: deque[Reading] = deque(maxlen=_KEPT)
        self._tally = Tally()
        self._known = _Steps()
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
        for event in before.events:
            self._recall(event)
        for reading in before.readings:
            self._remember(reading)
        for series in before.series:
            self.histories.take_up(series, step)

    def keep(self, reading: Reading) -> None:
        """Keep what a step was in numbers."""
        self._remember(reading)
        if self._folder is not None:
            self._unwritten.append(reading)

    def _remember(self, reading: Reading) -> None:
        self.readings.append(reading)
        if not reading.skipped:
            self._known.add(reading.step)

    def note(self, events: Sequence[Event]) -> None:
        """Note what happened, in the log too."""
        for event in events:
            self._recall(event)
            if self._folder is not None:
                self._unwritten.append(event)
            _log.log(logging.INFO if event.normal else logging.WARNING, "%s", event.sentence)

    def _recall(self, event: Event) -> None:
        self.events.append(event)
        self._tally.add(event)

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
        known = self._known
        found = self._tally.verdict(len(known))
        if known.gap is None:
            return found
        first, onwards = known.gap
        lacking = known.end - len(known)
        unknown = (
            f"Of the run's {known.end} steps {lacking} have no record: it lacks those from {first} on and goes on at step "
            f"{onwards}; they were trained without the doctor, or what it wrote was lost."
        )
        return found.model_copy(update={"sentences": (*found.sentences, unknown)})

    def record(self) -> Record:
        """Return what is kept of it; :func:`narrowcast.training.doctor.record.read` gives all that was written."""
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


class _Steps:
    """Whole numbers from 0, kept as the spans that they make up."""

    def __init__(self) -> None:
        self._spans: list[
            tuple[int, int]
        ] = []  # the first one, and the one behind the last; in order, with gaps between

    def __len__(self) -> int:
        return sum(end - begin for begin, end in self._spans)

    @property
    def end(self) -> int:
        """The one behind the last."""
        return self._spans[-1][1] if self._spans else 0

    @property
    def gap(self) -> tuple[int, int] | None:
        """The first that is missing, and the next that is not; None if none is."""
        begin, end = self._spans[0] if self._spans else (0, 0)
        if begin > 0:
            return 0, begin
        return (end, self._spans[1][0]) if len(self._spans) > 1 else None

    def add(self, step: int) -> None:
        """Add one that may be there already."""
        place = bisect_right(self._spans, step, key=lambda span: span[0])
        begin, end = step, step + 1
        if place and self._spans[place - 1][1] >= step:
            place -= 1
            begin, before = self._spans.pop(place)
            end = max(end, before)
        if place < len(self._spans) and self._spans[place][0] == end:
            _, end = self._spans.pop(place)
        self._spans.insert(place, (begin, end))

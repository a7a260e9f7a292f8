"""What is known of a run's numbers, and what formats would do to them: read once, shown by the terminal and by the page."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from narrowcast.errors import ArtifactError
from narrowcast.formats.kinds import Format
from narrowcast.report.doctor_files import SkipLine, cut, lines, logged, skips
from narrowcast.report.doctor_words import cause_title
from narrowcast.training.doctor.buckets import EDGES, INFINITE, NOT_A_NUMBER
from narrowcast.training.doctor.record import FOLDER, read
from narrowcast.training.doctor.values import Event, Part, Reading, Record, Series
from narrowcast.training.doctor.whatif import Bounds, Shares, element, overflow_limit, shares, stagnant
from narrowcast.training.logs import LOG, SKIPS

__all__ = [
    "CAST",
    "PARTS",
    "Happening",
    "Held",
    "LayerView",
    "PartView",
    "Run",
    "harm",
    "open_run",
    "worst",
]

#: The parts that are shown, with their words.
PARTS = {
    Part.FORWARD: "activations",
    Part.BACKWARD: "gradients of activations",
    Part.GRADIENT: "gradients of parameters",
    Part.WEIGHT: "weights",
    Part.UPDATE: "updates",
}
#: Those that may be cast to another format in training; updates are computed in FP32.
CAST = tuple(part for part in PARTS if part is not Part.UPDATE)
#: Parts that carry the loss scale where there is one.
_SCALED = (Part.BACKWARD, Part.GRADIENT)
#: What is asked about first, by what the policy computes in.
_FIRST = {"fp8": "e4m3fn", "fp32": "fp16", "tf32": "fp16"}
_RECORD = f"{FOLDER}/record.jsonl"


@dataclass(frozen=True)
class Happening:
    """Events that are alike but for their numbers: the first of them, how many there are, and the step of the last."""

    first: Event
    count: int
    last: int

    @property
    def again(self) -> str:
        """How often it came again, in words; empty for once."""
        if self.count == 1:
            return ""
        times = "once more" if self.count == 2 else f"{self.count - 1} times more"
        return f"{times}, last at step {self.last}"


@dataclass(frozen=True)
class Held:
    """What a format would do to the numbers of a layer and part.

    Attributes:
        format: Name of the format.
        plain: As they are: gradients times the loss scale, the rest as computed.
        scaled: Each with the power of two that puts its largest number just under the format's largest, as tensorwise scaling
            does.
        factor: That power of two.
    """

    format: str
    plain: Shares
    scaled: Shares
    factor: float


@dataclass(frozen=True)
class PartView:
    """A layer and part in numbers, over the whole run.

    Attributes:
        part: Which.
        largest: The largest finite magnitude; 0 if there is none.
        smallest: What every number but zeros exceeds.
        count: Numbers that were counted.
        numbers: Numbers that there were; if they are more, shares are of a sample.
        infinite: How many infinities.
        nan: How many NaN.
        held: By format.
    """

    part: Part
    largest: float
    smallest: float
    count: int
    numbers: int
    infinite: int
    nan: int
    held: dict[str, Held]


@dataclass(frozen=True)
class LayerView:
    """A layer with its parts.

    Attributes:
        name: In the model; empty for the model itself.
        kind: Its class.
        parameters: How many numbers its own parameters hold.
        parts: What was counted.
        ratio: The median of its updates, in units of their weights' binades; None if no update was counted.
        stagnant: By format, the share of its updates that plain weights in it would lose.
    """

    name: str
    kind: str
    parameters: int
    parts: dict[Part, PartView]
    ratio: float | None
    stagnant: dict[str, Bounds]


@dataclass(frozen=True)
class Run:
    """A run's folder as it was read.

    Attributes:
        folder: The run's.
        record: What the doctor wrote.
        log: Lines of ``log.jsonl``; empty if there is none.
        skips: Lines of ``skips.jsonl``.
        formats: Names of the formats that are asked about, the main one first.
        notes: What could not be read, and what the doctor could not watch, for people.
    """

    folder: Path
    record: Record
    log: tuple[dict[str, Any], ...]
    skips: tuple[SkipLine, ...]
    formats: tuple[str, ...]
    notes: tuple[str, ...]

    @cached_property
    def scale(self) -> float:
        """The loss scale of the last update that was done; 1 without one."""
        return next((reading.scale for reading in reversed(self.readings) if not reading.skipped), 1.0)

    @cached_property
    def layers(self) -> tuple[LayerView, ...]:
        """The layers that have histograms, in the model's order."""
        by_layer: dict[str, list[Series]] = {}
        for series in self.record.series:
            by_layer.setdefault(series.layer, []).append(series)
        return tuple(
            _layer(name, kind, parameters, by_layer[name], self.formats, self.scale)
            for name, kind, parameters in self._known()
            if name in by_layer
        )

    def _known(self) -> Iterator[tuple[str, str, int]]:
        named = {layer.name for layer in self.record.setting.layers}
        for layer in self.record.setting.layers:
            yield layer.name, layer.kind, layer.parameters
        for name in dict.fromkeys(series.layer for series in self.record.series):
            if name not in named:
                yield name, "", 0

    @cached_property
    def readings(self) -> tuple[Reading, ...]:
        """A reading for each step, by the updates before it: the doctor's, or the log's if the doctor kept none."""
        return self.record.readings or tuple(logged(self.log))

    @property
    def steps(self) -> int:
        """Updates that were done."""
        return self.readings[-1].step + (not self.readings[-1].skipped) if self.readings else 0

    @cached_property
    def skipped(self) -> tuple[int, ...]:
        """The step of each update that was left out, in order."""
        if self.skips:
            return tuple(skip.step for skip in self.skips)
        return tuple(reading.step for reading in self.record.readings if reading.skipped)

    @cached_property
    def counted(self) -> tuple[int, int]:
        """How many numbers were counted, and how many there were; if they are more, shares are of a sample."""
        views = [view for layer in self.layers for view in layer.parts.values()]
        return sum(view.count for view in views), sum(view.numbers for view in views)

    @property
    def stored(self) -> str:
        """The format that weights are kept in."""
        name = self.record.setting.precision
        return name.removesuffix("-true") if name.endswith("-true") else "fp32"

    @cached_property
    def events(self) -> tuple[Happening, ...]:
        """What happened, alike events as one: first what needs attention, and of that first what was explained."""
        alike: dict[tuple[object, ...], list[Event]] = {}
        for event in self.record.events:
            alike.setdefault(_signature(event), []).append(event)
        found = [Happening(events[0], len(events), max(one.step for one in events)) for events in alike.values()]
        return tuple(sorted(found, key=lambda one: (one.first.normal, one.first.cause is None, one.first.step)))

    @property
    def headline(self) -> str:
        """The verdict in one sentence: the first cause, if there is one."""
        summary = self.record.summary
        if summary is None:
            return "The run ended before there was a verdict"
        cause = next((one.first.cause for one in self.events if not one.first.normal), None)
        if not summary.verdict.healthy and cause is not None:
            return f"{cause_title(cause)}, at step {cause.step}"
        if summary.verdict.sentences:
            return summary.verdict.sentences[0].rstrip(".")
        return "The numbers are sound" if summary.verdict.healthy else "The numbers need attention"

    @property
    def findings(self) -> tuple[str, ...]:
        """What the verdict says beside the headline."""
        summary = self.record.summary
        said = () if summary is None else summary.verdict.sentences
        return tuple(sentence for sentence in said if sentence.rstrip(".") != self.headline)

    @property
    def healthy(self) -> bool | None:
        """Whether nothing needs attention; None without a verdict."""
        return None if self.record.summary is None else self.record.summary.verdict.healthy


def open_run(folder: Path, formats: Sequence[str] = ()) -> Run:
    """Return what a run's folder says of its numbers.

    Args:
        folder: The run's.
        formats: Formats to ask about first, by name; those of the record follow.

    Raises:
        ArtifactError: There is no folder, no record in it, or a damaged one.
        FormatError: An unknown format, or one of blocks.
    """
    asked = [element(name).name for name in formats]
    if not folder.is_dir():
        raise ArtifactError(
            f"run folder {folder} does not exist" if not folder.exists() else f"{folder} is a file",
            allowed="the folder of a training run",
            next_step="name the one that `narrowcast train CONFIG --out DIR` wrote",
        )
    record = read(folder)
    log, log_notes = lines(folder / LOG)
    ledger, ledger_notes = lines(folder / SKIPS)
    skipped, skip_notes = skips(ledger)
    return Run(
        folder=folder,
        record=record,
        log=tuple(log),
        skips=tuple(skipped),
        formats=_formats(record, asked),
        notes=(
            *cut(folder / _RECORD),
            *log_notes,
            *ledger_notes,
            *skip_notes,
            *record.setting.notes,
            *_unseen(record),
        ),
    )


def _formats(record: Record, asked: Sequence[str]) -> tuple[str, ...]:
    """Return the formats to show: those asked for, the one that the run computes in, then the record's."""
    compute = record.setting.compute
    return tuple(dict.fromkeys([*asked, _FIRST.get(compute, compute), *record.setting.formats]))


def worst(run: Run, part: Part, format: str) -> tuple[str, Held] | None:
    """Return the layer that a format would do most harm to, with what it would do; None if nothing of that part is known."""
    found = [(layer.name, layer.parts[part].held[format]) for layer in run.layers if part in layer.parts]
    return max(found, key=lambda item: (harm(item[1].plain), item[1].plain.subnormal.high), default=None)


def harm(found: Shares) -> float:
    """Return the share of numbers that a format loses: beyond its largest, or to zero."""
    return found.overflow.high + found.zero.high


def _signature(event: Event) -> tuple[object, ...]:
    """Return what alike events have in common: all but their numbers."""
    cause = event.cause
    about = None if cause is None else (cause.layer, cause.operator, cause.part, cause.kind)
    return event.kind, event.normal, event.rank, about or re.sub(r"\d+", "0", event.sentence)


# Reading --------------------------------------------------------------------------------------------------------------


def _unseen(record: Record) -> Iterator[str]:
    """Yield a note if only the deep level would have seen what is asked."""
    if record.setting.level == "cheap" and record.series and all(one.part is not Part.FORWARD for one in record.series):
        yield "activations and their gradients were not counted: the cheap level leaves them out, `doctor: deep` has them"


# Views ----------------------------------------------------------------------------------------------------------------


def _layer(
    name: str, kind: str, parameters: int, series: Sequence[Series], formats: Sequence[str], scale: float
) -> LayerView:
    by_part = {one.part: one for one in series}
    ratios = by_part.get(Part.RATIO)
    floats = [name for name in formats if isinstance(element(name), Format)]
    return LayerView(
        name,
        kind,
        parameters,
        {part: _part(by_part[part], formats, scale) for part in PARTS if part in by_part},
        None if ratios is None else _median(ratios.total),
        {} if ratios is None else {one: stagnant(ratios.total, one) for one in floats},
    )


def _median(counts: np.ndarray) -> float | None:
    """Return the upper end of the bucket that the median of all finite numbers but zeros falls in."""
    running = np.cumsum(counts[1:INFINITE])
    return float(EDGES[int(np.searchsorted(running, running[-1] / 2)) + 1]) if running[-1] else None


def _part(series: Series, formats: Sequence[str], scale: float) -> PartView:
    used = np.flatnonzero(series.total[1:INFINITE])
    largest = float(series.largest.max(initial=0.0))
    largest = largest if math.isfinite(largest) else 0.0
    carried = scale if series.part in _SCALED else 1.0
    return PartView(
        part=series.part,
        largest=largest,
        smallest=float(EDGES[used[0]]) if used.size else 0.0,
        count=int(series.total.sum()),
        numbers=series.numbers,
        infinite=int(series.total[INFINITE]),
        nan=int(series.total[NOT_A_NUMBER]),
        held={name: _held(series, name, largest, carried) for name in formats},
    )


def _held(series: Series, format: str, largest: float, carried: float) -> Held:
    factor = 1.0
    if largest > 0:
        factor = 2.0 ** math.floor(math.log2(overflow_limit(format) / largest) - 1e-9)
        factor = min(max(factor, 2.0**-126), 2.0**126)
    known = largest or math.inf
    return Held(
        format,
        shares(series.total, format, scale=carried, largest=known),
        shares(series.total, format, scale=factor, largest=known),
        factor,
    )

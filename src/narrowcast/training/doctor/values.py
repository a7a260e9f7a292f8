"""What the numerics doctor sees and says, as values: readings, events with their causes, histograms, advice. No torch.

:mod:`narrowcast.training.doctor.record` writes them to a run's folder and reads them back.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from pydantic import BaseModel, ConfigDict

__all__ = [
    "SCHEMA",
    "Cause",
    "Event",
    "EventKind",
    "FormatAdvice",
    "Layer",
    "Mark",
    "Part",
    "Range",
    "Reading",
    "Record",
    "Remedy",
    "ScaleAdvice",
    "Series",
    "Setting",
    "Summary",
    "Verdict",
]

#: Version of the record; a reader refuses any other.
SCHEMA = 2


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Part(StrEnum):
    """What a histogram counts, or where a fault lies."""

    #: What a layer gives in the forward pass: its activations.
    FORWARD = "forward"
    #: The gradient that comes to a layer's outputs in the backward pass, without the loss scale.
    BACKWARD = "backward"
    #: The gradients of a layer's own parameters, without the loss scale.
    GRADIENT = "gradient"
    #: A layer's own parameters.
    WEIGHT = "weight"
    #: What an optimizer step added to them.
    UPDATE = "update"
    #: The same in units of the weight's binade: ``|update| / 2**floor(log2(|weight|))``.
    RATIO = "ratio"


class EventKind(StrEnum):
    """What kind of thing happened."""

    #: A skipped step while the dynamic loss scale was being found: normal.
    BACKOFF = "back-off"
    #: The loss or a gradient became infinite or NaN.
    NONFINITE = "non-finite"
    #: Input data hold infinities or NaN.
    DATA = "data"
    #: Gradients became zero.
    VANISHED = "vanished"
    #: Updates are too small to move the weights.
    STAGNATION = "stagnation"
    #: A saturating cast hides an overflow.
    SATURATION = "saturation"


class Layer(_Value):
    """A module: its name in the model (empty for the model itself), its class, and how many numbers its own parameters hold."""

    name: str
    kind: str
    parameters: int


class Setting(_Value):
    """How the doctor was set up.

    Attributes:
        schema_version: :data:`SCHEMA`.
        level: ``cheap`` or ``deep``.
        every: Steps from one deep sample to the next.
        precision: Name of the policy.
        compute: Format that the forward pass computes in.
        formats: Formats that the report asks about.
        layers: Modules, in the model's order.
        world: Number of ranks.
        compiled: Whether parts of the model are compiled; activations are then seen in deep samples alone.
        notes: What could not be watched, and why; for people.
    """

    schema_version: int = SCHEMA
    level: str
    every: int
    precision: str
    compute: str
    formats: tuple[str, ...]
    layers: tuple[Layer, ...]
    world: int = 1
    compiled: bool = False
    notes: tuple[str, ...] = ()


class Reading(_Value):
    """One step in numbers; ``grad_norm`` is without the loss scale, before clipping. None where nothing was given."""

    step: int
    loss: float | None = None
    grad_norm: float | None = None
    scale: float = 1.0
    skipped: bool = False


class Mark(_Value):
    """A checkpoint after ``step`` updates goes on from the lines before this one."""

    step: int


class Range(_Value):
    """An input or a result of an operator in numbers.

    Attributes:
        name: Which it is: ``input 0``, ``result``, or a parameter's name.
        dtype: As PyTorch prints it, such as ``float16``.
        shape: Its shape.
        low: The least finite number; None if there is none.
        high: The greatest finite number.
        smallest: The smallest magnitude that is not zero.
        zeros: How many zeros.
        infinite: How many infinities.
        nan: How many NaN.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    low: float | None
    high: float | None
    smallest: float | None
    zeros: int
    infinite: int
    nan: int


class Remedy(_Value):
    """What was tried against a cause.

    Attributes:
        kind: ``scale``, ``format``, ``layer``, ``clipping``, ``epsilon``, ``maximum``, ``initialisation``, ``rounding``,
            ``data`` or ``fresh scale``.
        setting: What to do, in words: "keep layer 'head' in fp32".
        mended: Whether the replay was sound with it.
        evidence: What the replay showed.
        overrides: The same as ``precision(..., overrides=...)`` takes it, if that is how it is set.
    """

    kind: str
    setting: str
    mended: bool
    evidence: str
    overrides: dict[str, str] = {}


class Cause(_Value):
    """Where a number broke first.

    Attributes:
        step: Optimizer steps done before.
        rank: The rank that it broke on.
        part: ``forward``, ``backward`` or ``update``.
        layer: Name of the module; empty for the model itself, ``loss`` for the loss function, ``data`` for the inputs.
        operator: PyTorch's name, such as ``aten.addmm``; ``data`` for the inputs.
        call: How many times this operator ran in this layer and pass before.
        kind: ``inf``, ``nan``, ``zero``, ``saturated`` or ``stagnant``.
        inputs: What went in and what came out.
        seen: What was seen, as a sentence.
        samples: Positions in the batch of the samples that broke, for faulty data.
        reproduced: Whether the replay broke as the step did.
        remedies: What was tried, those that mend it first.
    """

    step: int
    rank: int
    part: Part
    layer: str
    operator: str
    call: int = 0
    kind: str
    inputs: tuple[Range, ...] = ()
    seen: str
    samples: tuple[int, ...] = ()
    reproduced: bool = True
    remedies: tuple[Remedy, ...] = ()

    @property
    def mends(self) -> tuple[Remedy, ...]:
        """The remedies that mended it in the replay."""
        return tuple(remedy for remedy in self.remedies if remedy.mended)


class Event(_Value):
    """Something that happened; ``normal`` if it needs nobody's attention. ``sentence`` says it for people."""

    kind: EventKind
    step: int
    rank: int
    normal: bool
    sentence: str
    cause: Cause | None = None


class ScaleAdvice(_Value):
    """The loss scale that the gradients ask for.

    Attributes:
        scale: The largest power of two that overflows nothing, with the margin.
        format: Format of the gradients.
        margin: What the largest gradient may still grow by, as a factor.
        lost: Share of the gradients that become zero without a scale.
        lost_scaled: The same with this scale.
        evidence: The same as a sentence.
    """

    scale: float
    format: str
    margin: float
    lost: float
    lost_scaled: float
    evidence: str


class FormatAdvice(_Value):
    """The narrowest of the formats asked about that holds a layer's numbers, or that none does, with the evidence.

    Attributes:
        layer: Its name.
        part: Forward or backward.
        format: The format; fp32 if no narrower one holds.
        scale: The power of two to multiply by first.
        evidence: As a sentence.
    """

    layer: str
    part: Part
    format: str
    scale: float
    evidence: str


class Verdict(_Value):
    """The answer: healthy, or not, with one sentence for each finding and what needs attention first."""

    healthy: bool
    sentences: tuple[str, ...]


class Summary(_Value):
    """What follows from all that was seen: written at the end and with each write of the histograms."""

    verdict: Verdict
    scale: ScaleAdvice | None = None
    formats: tuple[FormatAdvice, ...] = ()


@dataclass(frozen=True)
class Series:
    """Histograms of one layer and part over time.

    Attributes:
        layer: Name of the module.
        part: What is counted.
        steps: Shape [T]: the step of each sample, increasing. When there are many, every other one is dropped.
        scales: Shape [T]: the loss scale at that time.
        columns: Shape [T, COLUMNS], int64: counts by octave, see :mod:`narrowcast.training.doctor.buckets`.
        largest: Shape [T]: the largest finite magnitude, up to the next step here. Of activations and all gradients it is that
            of the whole tensors (where one is not finite, that of its sample), of the rest that of the samples.
        total: Shape [BUCKETS], int64: counts of all samples, those dropped too.
        numbers: How many numbers the tensors held. If ``total`` counts fewer, it is an evenly spaced sample, and of activations
            and gradients the least and the greatest number beside it, infinities and NaN above all: shares are estimates.
        seen: How many samples there were, those dropped too.
    """

    layer: str
    part: Part
    steps: np.ndarray
    scales: np.ndarray
    columns: np.ndarray
    largest: np.ndarray
    total: np.ndarray
    numbers: int
    seen: int

    @property
    def sampled(self) -> bool:
        """Whether fewer numbers were counted than the tensors held."""
        return int(self.total.sum()) < self.numbers


@dataclass(frozen=True)
class Record:
    """All that the doctor wrote.

    Attributes:
        setting: How it was set up.
        readings: One a step, in order; the last one holds where a run was resumed and a step was done again.
        events: In order.
        series: In the model's order of layers.
        summary: Verdict and advice; None if the run ended before the first.
    """

    setting: Setting
    readings: tuple[Reading, ...]
    events: tuple[Event, ...]
    series: tuple[Series, ...]
    summary: Summary | None

    def of(self, layer: str, part: Part) -> Series | None:
        """Return the series of a layer and part, if there is one."""
        return next((one for one in self.series if (one.layer, one.part) == (layer, part)), None)

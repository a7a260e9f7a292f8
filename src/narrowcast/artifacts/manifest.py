"""What an artifact says about itself, and the evidence that it carries."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from narrowcast.data.metrics import Metric
from narrowcast.recipes.budget import Budget, Standing
from narrowcast.recipes.plan import Plan
from narrowcast.recipes.recipe import Recipe
from narrowcast.recipes.target import Target

__all__ = [
    "SCHEMA",
    "Blame",
    "Candidate",
    "DataRecord",
    "Environment",
    "Evidence",
    "Histogram",
    "Manifest",
    "Measurement",
    "MetricRecord",
    "ModelRecord",
    "OperatorShare",
    "Verdict",
]

#: Version of the artifact format; a reader refuses any other.
SCHEMA = 1


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class ModelRecord(_Value):
    """The model that was optimised: reference, SHA-256 and bytes of its ONNX export, and whether anybody trained it."""

    ref: str
    sha256: str
    bytes: int
    random_weights: bool


class DataRecord(_Value):
    """The data that were used: reference, hash, seed of the split, and the number of samples in each part."""

    ref: str
    sha256: str
    seed: int
    calibration: int
    search: int
    report: int
    note: str = ""


class MetricRecord(_Value):
    """The metric that accuracy was judged by."""

    name: str
    unit: str
    higher_is_better: bool

    @classmethod
    def of(cls, metric: Metric) -> MetricRecord:
        """Return the record of a metric."""
        return cls(name=metric.name, unit=metric.unit, higher_is_better=metric.higher_is_better)


class Environment(_Value):
    """The machine and the software that measured.

    Attributes:
        processor: Model name of the processor.
        cores: Cores that this process may use.
        instructions: Vector and matrix instruction sets that decide how fast integers are.
        governor: Frequency governor, where the system says it.
        memory_bytes: Memory of the machine.
        system: Operating system and its release.
        load: Load average of the minute before this was read, at the end of the measurements.
        versions: Versions of Python and of the libraries that matter.
    """

    processor: str
    cores: int
    instructions: tuple[str, ...]
    governor: str | None
    memory_bytes: int
    system: str
    load: float | None
    versions: dict[str, str]


class Measurement(_Value):
    """One measured number.

    Attributes:
        measure: What was measured, for example ``latency_p50``.
        subject: Whose: ``original``, ``artifact``, or ``ratio`` (how many times better the artifact is).
        value: The estimate.
        unit: Its unit.
        low: Lower end of its 95 % confidence interval, where there is one.
        high: Upper end.
        samples: Number of runs or samples behind it.
        protocol: How it was measured.
    """

    measure: str
    subject: Literal["original", "artifact", "ratio"]
    value: float
    unit: str
    low: float | None = None
    high: float | None = None
    samples: int = 1
    protocol: str = ""


class Candidate(_Value):
    """One candidate that was built and run during the search.

    Attributes:
        name: Name of its recipe.
        recipe: The recipe.
        accuracy: The metric on the search part.
        accuracy_low: Lower end of its 95 % confidence interval.
        accuracy_high: Upper end.
        latency: Median latency in seconds.
        speedup: Median ratio of the original's latency to its own, measured in pairs.
        speedup_low: Lower end of the interval.
        speedup_high: Upper end.
        size: Bytes on disk.
        memory: Peak memory of a process that serves it, in bytes, where it was measured.
        standings: Each limit beside what was measured.
        feasible: Whether all limits hold.
        shares: Share of operator groups per format.
        kept_float: Operator groups that were put back to FP32.
        seconds: Time that building and measuring it took.
        failure: Why it could not be built or run; empty if it could.
    """

    name: str
    recipe: Recipe
    accuracy: float = float("nan")
    accuracy_low: float = float("nan")
    accuracy_high: float = float("nan")
    latency: float = float("nan")
    speedup: float = float("nan")
    speedup_low: float = float("nan")
    speedup_high: float = float("nan")
    size: int = 0
    memory: float | None = None
    standings: tuple[Standing, ...] = ()
    feasible: bool = False
    shares: dict[str, float] = Field(default_factory=dict[str, float])
    kept_float: int = 0
    seconds: float = 0.0
    failure: str = ""


class Blame(_Value):
    """What quantising one operator group alone does to the model's output (in simulation; guides the search only).

    Attributes:
        group: Name of the group.
        op_type: Type of its main operator.
        noise: Energy of the error at the outputs as a share of their energy.
        seconds: Time of the group in FP32 in one run on the target runtime; 0 where the profile does not show it.
        kept_float: Whether the chosen artifact keeps it in FP32.
    """

    group: str
    op_type: str
    noise: float
    seconds: float
    kept_float: bool = False


class OperatorShare(_Value):
    """Where the original spends time and bytes, by operator type."""

    op_type: str
    count: int
    seconds: float
    time_share: float
    bytes: int


class Histogram(_Value):
    """Values of one tensor before and after quantisation: bin edges and counts."""

    tensor: str
    sqnr_db: float
    edges: tuple[float, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]


class Verdict(_Value):
    """The answer.

    Attributes:
        met: Whether the artifact keeps all limits, accuracy judged on the report part alone.
        headline: The answer in one sentence.
        standings: Each limit beside what was measured.
        advice: What would help, or what the limits cost where they leave hardly a gain.
    """

    met: bool
    headline: str
    standings: tuple[Standing, ...] = ()
    advice: tuple[str, ...] = ()


class Evidence(_Value):
    """Everything that a report shows; ``report.json`` is this value."""

    narrowcast: str
    created: str
    model: ModelRecord
    data: DataRecord
    metric: MetricRecord
    budget: Budget
    target: Target
    environment: Environment
    chosen: str
    verdict: Verdict
    measurements: tuple[Measurement, ...] = ()
    candidates: tuple[Candidate, ...] = ()
    blame: tuple[Blame, ...] = ()
    profile: tuple[OperatorShare, ...] = ()
    histograms: tuple[Histogram, ...] = ()
    plan: Plan
    evaluations: int = 0
    seconds: float = 0.0

    def measured(self, measure: str, subject: str) -> Measurement | None:
        """Return one measurement, or None where it was not made."""
        return next((m for m in self.measurements if (m.measure, m.subject) == (measure, subject)), None)


class Manifest(_Value):
    """``manifest.json``: what the artifact is, what is in its folder, and what was measured.

    Attributes:
        schema_version: Version of the artifact format.
        narrowcast: Version of narrowcast that built it.
        created: Time of building, ISO 8601, UTC.
        model: The model that it was made from.
        data: The data that were used.
        metric: The metric.
        target: The runtime and how it is used.
        plan: What happens to each operator, with the recipe.
        versions: Versions of the libraries that built it.
        files: SHA-256 of each other file in the folder.
        parity: Largest difference from the stored reference outputs that verification accepts, as a share of the largest.
        measurements: What was measured, with protocols.
        environment: Where it was measured.
        verdict: The answer that the artifact is.
    """

    schema_version: int = SCHEMA
    narrowcast: str
    created: str
    model: ModelRecord
    data: DataRecord
    metric: MetricRecord
    target: Target
    plan: Plan
    versions: dict[str, str]
    files: dict[str, str]
    parity: float
    measurements: tuple[Measurement, ...]
    environment: Environment
    verdict: Verdict

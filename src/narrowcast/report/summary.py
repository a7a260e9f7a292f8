"""What the page and the terminal both show, as rows of text made from `Evidence`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from narrowcast.artifacts.manifest import Evidence, Measurement, MetricRecord
from narrowcast.recipes.budget import Standing
from narrowcast.report import text

__all__ = [
    "Cell",
    "KeyNumber",
    "LimitRow",
    "SummaryRow",
    "key_numbers",
    "limit_rows",
    "measure_label",
    "measurement_rows",
    "ratio_cell",
    "summary_rows",
    "verdict_badge",
]

TOO_FEW = "too few runs"

# measure: (label, word where the artifact is better, word where it is worse)
_MEASURES: dict[str, tuple[str, str, str]] = {
    "accuracy": ("Accuracy", "better", "worse"),
    "accuracy_drop": ("Accuracy drop", "", ""),
    "size": ("Size on disk", "smaller", "larger"),
    "compression": ("Compression", "smaller", "larger"),
    "latency_p50": ("Latency, median", "faster", "slower"),
    "latency_p90": ("Latency, p90", "faster", "slower"),
    "latency_p99": ("Latency, p99", "faster", "slower"),
    "throughput": ("Throughput", "more", "less"),
    "best_batch": ("Best batch size", "", ""),
    "latency_best_batch_p50": ("Latency at best batch", "", ""),
    "latency_best_batch_p90": ("p90 at best batch", "", ""),
    "latency_best_batch_p99": ("p99 at best batch", "", ""),
    "peak_memory": ("Peak memory", "less", "more"),
    "added_memory": ("Memory for the graph", "less", "more"),
}
_LATENCIES = ("latency_p50", "latency_p90", "latency_p99")
_BATCH_LATENCIES = ("latency_best_batch_p50", "latency_best_batch_p90", "latency_best_batch_p99")
# A quotient of these is arithmetic. A quotient of two timings would look like a result and have no interval.
_EXACT = ("size", "peak_memory")


@dataclass(frozen=True)
class Cell:
    """One value as text, with its interval (empty where there is none) and a word on what it means.

    Attributes:
        value: The value.
        interval: Its 95 % confidence interval.
        word: What a ratio says, for example ``faster``.
        better: Whether a ratio speaks for the artifact; None for other values, ties and ratios of one.
    """

    value: str = text.MISSING
    interval: str = ""
    word: str = ""
    better: bool | None = None


@dataclass(frozen=True)
class SummaryRow:
    """One measure before and after.

    Attributes:
        measure: Name of the measure in the evidence.
        label: Name for people.
        hint: How it was taken, in a few words.
        original: The original's value.
        artifact: The artifact's value.
        ratio: How many times better the artifact is; ``tie`` where the interval holds 1.
        samples: Number of samples behind the row.
    """

    measure: str
    label: str
    hint: str
    original: Cell
    artifact: Cell
    ratio: Cell
    samples: str


@dataclass(frozen=True)
class KeyNumber:
    """One of the three numbers that head the report."""

    name: str
    value: str
    word: str
    detail: str


@dataclass(frozen=True)
class LimitRow:
    """A limit, what was measured, and how far the two are apart."""

    met: bool
    text: str
    measure: str
    value: str
    bound: str
    margin: str


def verdict_badge(evidence: Evidence) -> str:
    """Return the verdict in two or three words."""
    if not evidence.verdict.standings:
        return "No limits given"
    return "Budget met" if evidence.verdict.met else "Budget not met"


def measure_label(measure: str) -> str:
    """Return a measure's name for people; an unknown one is spelt out."""
    known = _MEASURES.get(measure)
    return known[0] if known else measure.replace("_", " ").strip().capitalize()


@dataclass(frozen=True)
class _Given:
    """Measurements, and what is known about how they were taken."""

    measurements: Sequence[Measurement]
    metric: MetricRecord
    batch: int | None

    def measured(self, measure: str, subject: str) -> Measurement | None:
        return next((m for m in self.measurements if (m.measure, m.subject) == (measure, subject)), None)


def summary_rows(evidence: Evidence) -> list[SummaryRow]:
    """Return the before/after rows of a report."""
    return _rows(_Given(evidence.measurements, evidence.metric, evidence.target.batch))


def measurement_rows(measurements: Sequence[Measurement], metric: MetricRecord | None = None) -> list[SummaryRow]:
    """Return the before/after rows of measurements that no evidence surrounds.

    Args:
        measurements: What was measured.
        metric: What accuracy is; a plain number where nobody says.
    """
    unit = next((m.unit for m in measurements if m.measure == "accuracy"), "")
    return _rows(_Given(measurements, metric or MetricRecord(name="", unit=unit, higher_is_better=False), None))


def _rows(given: _Given) -> list[SummaryRow]:
    """Return measures that the report knows in its order, then all others as they come.

    A latency percentile that was not measured although the median was gets a row that says so: the sample was too small
    to support it. A compression ratio joins the row of the size if that has no ratio of its own.
    """
    present = list(dict.fromkeys(m.measure for m in given.measurements))
    percentiles = [name for kind in (_LATENCIES, _BATCH_LATENCIES) if kind[0] in present for name in kind]
    wanted = [name for name in _MEASURES if name in present or name in percentiles]
    if "compression" in wanted and "size" in present and given.measured("size", "ratio") is None:
        wanted.remove("compression")
    return [_summary_row(given, name) for name in wanted + [name for name in present if name not in _MEASURES]]


def _summary_row(given: _Given, measure: str) -> SummaryRow:
    form = _format_of(given, measure)
    pair = [given.measured(measure, subject) for subject in ("original", "artifact")]
    none = TOO_FEW if measure in (*_LATENCIES, *_BATCH_LATENCIES) else text.MISSING
    cells = [_cell(found, form) if found else Cell(none) for found in pair]
    counts = list(dict.fromkeys(f"{found.samples:,}" for found in pair if found))
    ratio = given.measured(measure, "ratio")
    if measure == "size" and ratio is None:
        ratio = _compression(given)
    if not counts and ratio is not None:
        counts = [f"{ratio.samples:,}"]
    return SummaryRow(
        measure=measure,
        label=measure_label(measure),
        hint=_hint(given, measure),
        original=cells[0],
        artifact=cells[1],
        ratio=_ratio_cell(measure, ratio, pair),
        samples=" / ".join(counts) or text.MISSING,
    )


def _format_of(given: _Given, measure: str) -> text.Format:
    if measure == "accuracy":
        return text.accuracy(given.metric)
    if measure == "accuracy_drop":
        return text.drop(given.metric)
    units = [m.unit for m in given.measurements if m.measure == measure and m.subject != "ratio"]
    unit = units[0] if units else "x"
    return lambda value, extra: text.quantity(value, unit, extra)


def _cell(found: Measurement, form: text.Format) -> Cell:
    if not text.finite(found.value):
        return Cell(form(found.value, 0))
    return Cell(form(found.value, 0), text.interval(found.low, found.high, form) if found.low != found.high else "")


def _ratio_cell(measure: str, found: Measurement | None, pair: list[Measurement | None]) -> Cell:
    _, better, worse = _MEASURES.get(measure, ("", "better", "worse"))
    if measure == "accuracy_drop":
        return Cell("tie") if pair[1] is not None and text.tie(pair[1].low, pair[1].high, 0.0) else Cell("")
    if found is None:
        original, artifact = pair
        if measure not in _EXACT or original is None or artifact is None or artifact.value <= 0:
            return Cell("")
        return ratio_cell(original.value / artifact.value, None, None, better, worse)
    return ratio_cell(found.value, found.low, found.high, better, worse)


def ratio_cell(value: float, low: float | None, high: float | None, better: str, worse: str) -> Cell:
    """Return "how many times" with its interval; where that holds 1, the value is the word ``tie``."""
    if not text.finite(value):
        return Cell(text.MISSING)
    exact = low is None or high is None or low == high
    # An end that rounds to 1.00 would read as a tie where it is none, and the other way round.
    near = [end for end in (low, high) if text.finite(end) and end != 1 and text.ratio(end) == text.ratio(1.0)]
    span = "" if exact else text.interval(low, high, lambda end, extra: text.ratio(end, extra + bool(near)))
    if not exact and text.tie(low, high):
        return Cell("tie", span)
    if value == 1 or (exact and text.ratio(value) == text.ratio(1.0)):
        return Cell(text.ratio(value), span, "the same")
    return Cell(text.apart(value, 1.0, text.ratio)[0], span, better if value > 1 else worse, value > 1)


def _hint(given: _Given, measure: str) -> str:
    if measure in ("accuracy", "accuracy_drop"):
        return f"{given.metric.name}, report part" if given.metric.name else ""
    if measure in _LATENCIES:
        return "" if given.batch is None else f"batch {given.batch}"
    if measure in ("throughput", *_BATCH_LATENCIES):
        batches = [given.measured("best_batch", subject) for subject in ("original", "artifact")]
        known = list(dict.fromkeys(text.integer(b.value) for b in batches if b and text.finite(b.value)))
        shown = f" {' / '.join(known)}" if known else ""
        return f"at its best batch{shown}" if measure == "throughput" else f"batch{shown}"
    return {
        "compression": "times smaller",
        "peak_memory": "of a process that serves it",
        "added_memory": "part of the peak that the graph brings",
    }.get(measure, "")


def _compression(given: _Given) -> Measurement | None:
    return given.measured("compression", "ratio") or given.measured("compression", "artifact")


def key_numbers(evidence: Evidence) -> list[KeyNumber]:
    """Return the three numbers that head the report: speedup, compression, accuracy kept."""
    rows = {row.measure: row for row in summary_rows(evidence)}
    speed, size = rows.get("latency_p50"), rows.get("size") or rows.get("compression")
    return [
        _key("Speed", speed, "faster"),
        _key("Size", size, "smaller"),
        _accuracy_kept(evidence, rows.get("accuracy")),
    ]


def _key(name: str, row: SummaryRow | None, otherwise: str) -> KeyNumber:
    if row is None or row.ratio.value in ("", text.MISSING):
        return KeyNumber(name, text.MISSING, "not measured", _arrow(row))
    if row.ratio.value == "tie":
        return KeyNumber(name, "tie", "no measurable difference", _arrow(row))
    return KeyNumber(name, row.ratio.value, row.ratio.word or otherwise, _arrow(row))


def _accuracy_kept(evidence: Evidence, row: SummaryRow | None) -> KeyNumber:
    original, artifact = (evidence.measured("accuracy", subject) for subject in ("original", "artifact"))
    if row is None or artifact is None or row.artifact.value == text.MISSING:
        return KeyNumber("Accuracy", text.MISSING, "not measured", _arrow(row))
    scale = original.value if original is not None else float("nan")
    # A share of the original means something only for metrics that grow from zero; others show their own value.
    if evidence.metric.higher_is_better and evidence.metric.unit == "" and text.finite(scale) and scale > 0:
        kept = artifact.value / scale
        word = "of accuracy kept" + (" (random weights)" if evidence.model.random_weights else "")
        return KeyNumber(
            "Accuracy",
            "100%" if kept == 1 else text.apart(kept, 1.0, text.share)[0],
            word,
            f"{evidence.metric.name} {_arrow(row)}",
        )
    return KeyNumber("Accuracy", row.artifact.value, evidence.metric.name, _arrow(row))


def _arrow(row: SummaryRow | None) -> str:
    if row is None or text.MISSING in (row.original.value, row.artifact.value):
        return ""
    return f"{row.original.value} → {row.artifact.value}"


def limit_rows(evidence: Evidence, standings: tuple[Standing, ...] | None = None) -> list[LimitRow]:
    """Return each limit beside what was measured; those of the verdict unless others are given."""
    rows: list[LimitRow] = []
    for standing in evidence.verdict.standings if standings is None else standings:
        limit = standing.limit
        units = {"latency": "s", "size": "bytes", "memory": "bytes"}
        form = text.accuracy(evidence.metric) if limit.measure == "accuracy" else _in(units.get(limit.measure, ""))
        far = text.drop(evidence.metric) if limit.measure == "accuracy" else form
        value, bound = text.apart(standing.value, limit.bound, form)
        side = "at least" if limit.at_least else "at most"
        margin = ""
        if text.finite(standing.value) and text.finite(limit.bound):
            word = "to spare" if standing.met else "short" if limit.at_least else "over"
            margin = f"{far(abs(limit.bound - standing.value), 0)} {word}"
        measured = value if text.finite(standing.value) else "not measured"
        rows.append(LimitRow(standing.met, limit.text, limit.measure, measured, f"{side} {bound}", margin))
    return rows


def _in(unit: str) -> text.Format:
    return lambda value, extra: text.quantity(value, unit, extra)

"""The answer in words: whether the budget is met, and if not, what would help."""

from __future__ import annotations

from narrowcast.artifacts.manifest import Blame, Candidate, Measurement, MetricRecord, Verdict
from narrowcast.recipes.budget import Standing
from narrowcast.report import text
from narrowcast.search.candidates import nearest
from narrowcast.search.trial import Trial

__all__ = ["verdict_of"]

#: A speed-up below this is not what anybody asks for latency's sake.
GAIN = 1.2


def verdict_of(
    trial: Trial,
    chosen: Candidate,
    candidates: tuple[Candidate, ...],
    standings: tuple[Standing, ...],
    measurements: list[Measurement],
    blame: list[Blame],
) -> Verdict:
    """Return the verdict on the chosen artifact.

    Args:
        trial: The trial that it came from.
        chosen: The chosen candidate.
        candidates: All candidates.
        standings: Each limit beside the final measurements.
        measurements: The final measurements.
        blame: Blame of each operator group; may be empty.
    """
    met = all(standing.met for standing in standings)
    found = {(m.measure, m.subject): m for m in measurements}
    speed, size = found.get(("latency_p50", "ratio")), found.get(("compression", "ratio"))
    accuracy = found.get(("accuracy", "artifact"))
    parts: list[str] = []
    if speed is not None:
        tied = speed.low is not None and speed.high is not None and speed.low <= 1 <= speed.high
        parts.append("as fast as the original" if tied else _times(speed.value, "faster", "slower"))
    if size is not None:
        parts.append(_times(size.value, "smaller", "larger"))
    if accuracy is not None:
        parts.append(f"{trial.metric.name} {_metric(accuracy.value, trial)}")
    headline = f"{chosen.name}: {', '.join(parts)}."
    return Verdict(
        met=met,
        headline=headline,
        standings=standings,
        advice=_no_gain(trial, chosen, candidates) if met else _advice(trial, chosen, candidates, standings, blame),
    )


def _no_gain(trial: Trial, chosen: Candidate, candidates: tuple[Candidate, ...]) -> tuple[str, ...]:
    """Say what the limits cost, where they are kept only by a candidate that is hardly faster than the original."""
    if trial.budget.minimise != "latency" or chosen.speedup >= GAIN:
        return ()
    found = nearest([c for c in candidates if not c.feasible and not c.failure and c.speedup >= GAIN], "latency")
    if found is None:
        return ()
    return (
        f"Nothing faster keeps the limits. {found.name} comes nearest: {found.speedup:.2f}x faster, {trial.metric.name} "
        f"{_metric(found.accuracy, trial)} on the search part.",
    )


def _times(ratio: float, better: str, worse: str) -> str:
    return f"{ratio:.2f}x {better}" if ratio >= 1 else f"{1 / ratio:.2f}x {worse}"


def _metric(value: float, trial: Trial) -> str:
    return text.accuracy(MetricRecord.of(trial.metric))(value, 0)


def _advice(
    trial: Trial,
    chosen: Candidate,
    candidates: tuple[Candidate, ...],
    standings: tuple[Standing, ...],
    blame: list[Blame],
) -> tuple[str, ...]:
    advice: list[str] = []
    broken = {standing.limit.measure for standing in standings if not standing.met}
    if chosen.feasible and "accuracy" in broken:
        advice.append(
            "The search part kept the accuracy limit and the report part does not: the two differ by chance. More samples "
            "would narrow that, or a slightly tighter --max-drop would leave room for it."
        )
    for measure in sorted({standing.limit.measure for standing in standings}):
        others = [
            c
            for c in candidates
            if not c.failure and all(s.met for s in c.standings if s.limit.measure != measure) and not c.feasible
        ]
        best = max(others, key=lambda c: c.speedup, default=None)
        if best is not None:
            advice.append(
                f"With the {measure} limit alone relaxed, {best.name} would do: {trial.metric.name} "
                f"{_metric(best.accuracy, trial)} on the search part, {_times(best.speedup, 'faster', 'slower')}, "
                f"{text.quantity(best.size, 'bytes')}."
            )
    rounded = [item for item in blame if not item.kept_float]
    if "accuracy" in broken and rounded and any(step.type == "static_int8" for step in chosen.recipe.steps):
        worst = ", ".join(item.group for item in rounded[:3])
        advice.append(f"Most of the error comes from {worst}; quantisation-aware training of these would help most.")
    if "accuracy" in broken and trial.splits.calibration.size < 64:
        advice.append(f"Ranges came from {trial.splits.calibration.size} samples; a few hundred would make them surer.")
    if broken & {"latency", "speedup"}:
        advice.append("Latency: more threads, another runtime, or a smaller architecture are the next steps.")
    if broken & {"size", "memory"}:
        advice.append("Size and memory: INT8 is the narrowest format here; a smaller architecture is the next step.")
    return tuple(advice)

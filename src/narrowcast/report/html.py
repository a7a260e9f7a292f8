"""The report as one HTML page that needs nothing else: no network, no script, no font."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from narrowcast.artifacts.manifest import Evidence
from narrowcast.recipes.recipe import Step
from narrowcast.report import text
from narrowcast.report.bars import blame_bars, profile_bars, segments
from narrowcast.report.candidates import candidate_rows
from narrowcast.report.page import template
from narrowcast.report.summary import key_numbers, limit_rows, measure_label, summary_rows, verdict_badge

__all__ = ["render_html"]

#: Tensors whose distributions are drawn.
MOST_HISTOGRAMS = 12

_STEP_TITLES = {
    "optimise": "Optimise the graph, values stay FP32",
    "float16_weights": "Store weights in FP16",
    "weight_only_int8": "Store weights in INT8",
    "dynamic_int8": "INT8 with dynamic ranges",
    "static_int8": "INT8 with calibrated ranges",
}


@dataclass(frozen=True)
class _Setting:
    name: str
    value: str


@dataclass(frozen=True)
class _StepView:
    title: str
    settings: list[_Setting]


@dataclass(frozen=True)
class _ProtocolView:
    measures: str
    protocol: str


@dataclass(frozen=True)
class _Panel:
    tensor: str
    sqnr: str
    svg: Markup


def render_html(evidence: Evidence) -> str:
    """Return the report as a self-contained HTML page.

    Args:
        evidence: Everything that the page shows.
    """
    return template(
        "template.html.j2", text.label, text.quantity, text.number, text.integer, text.share, text.format_name
    ).render(_context(evidence))


def _context(evidence: Evidence) -> dict[str, Any]:
    bars, ticks = blame_bars(evidence.blame)
    operators = evidence.plan.operators
    wide, narrow = _scatters(evidence)
    rows = candidate_rows(evidence)
    return {
        "badge": verdict_badge(evidence),
        "evidence": evidence,
        "created": text.when(evidence.created),
        "keys": key_numbers(evidence),
        "limits": limit_rows(evidence),
        "rows": summary_rows(evidence),
        "segments": segments(evidence.plan.shares()),
        "format_counts": Counter(operator.format for operator in operators),
        "stored_only": sum(not operator.executed and operator.format != "fp32" for operator in operators),
        "scatter_wide": wide,
        "scatter_narrow": narrow,
        "candidates": rows,
        "failures": [row for row in rows if row.failure],
        "blame": bars,
        "blame_ticks": ticks,
        "no_blame": _no_blame(evidence),
        "panels": _panels(evidence),
        "profile": profile_bars(evidence.profile),
        "steps": [_step(step) for step in evidence.plan.recipe.steps],
        "protocols": _protocols(evidence),
        "took": text.quantity(evidence.seconds, "s"),
        "dash": text.MISSING,
    }


def _scatters(evidence: Evidence) -> tuple[Markup, Markup]:
    # Matplotlib takes long to import, so only a page that is rendered pays for it.
    from narrowcast.report import plots

    wide = plots.scatter(evidence, name="scatter-wide")
    narrow = plots.scatter(evidence, width=380, height=360, name="scatter-narrow")
    return Markup(wide), Markup(narrow)


def _panels(evidence: Evidence) -> list[_Panel]:
    from narrowcast.report import plots

    worst = sorted(evidence.histograms, key=lambda item: item.sqnr_db if text.finite(item.sqnr_db) else float("inf"))
    return [
        _Panel(
            shape.tensor,
            text.quantity(shape.sqnr_db, "dB"),
            Markup(plots.histogram(shape, name=f"histogram-{number}")),
        )
        for number, shape in enumerate(worst[:MOST_HISTOGRAMS])
    ]


def _no_blame(evidence: Evidence) -> str:
    narrowed = [operator for operator in evidence.plan.operators if operator.format != "fp32"]
    if not evidence.verdict.met:
        return "No operator was singled out: the search did not come to putting single operators back to FP32."
    if narrowed and len(narrowed) == len(evidence.plan.operators):
        return "The full reduction of precision met the budget, so no operator had to be singled out."
    return "It was not needed: the budget was met without asking which operators cost the most accuracy."


def _step(step: Step) -> _StepView:
    values = step.model_dump(exclude={"type", "version"})
    title = _STEP_TITLES.get(step.type, step.type.replace("_", " "))
    return _StepView(title, [_Setting(name.replace("_", " "), _plain(value)) for name, value in values.items()])


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, frozenset):
        return ", ".join(sorted(str(item) for item in value)) or "none"  # type: ignore[misc]
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(str(item) for item in value) or "none"
    return str(value)


def _protocols(evidence: Evidence) -> list[_ProtocolView]:
    """Return each protocol once, with the measures that were taken by it."""
    found: dict[str, list[str]] = {}
    for measurement in evidence.measurements:
        if measurement.protocol:
            found.setdefault(measurement.protocol, []).append(measure_label(measurement.measure))
    return [_ProtocolView("; ".join(dict.fromkeys(names)), protocol) for protocol, names in found.items()]

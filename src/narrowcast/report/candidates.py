"""Candidates as rows that the page and the terminal both show."""

from __future__ import annotations

from dataclasses import dataclass

from narrowcast.artifacts.manifest import Candidate, Evidence
from narrowcast.report import text
from narrowcast.report.summary import Cell, ratio_cell

__all__ = ["CandidateRow", "candidate_rows"]


@dataclass(frozen=True)
class CandidateRow:
    """A candidate as a row of text.

    Attributes:
        number: What the chart and the table call it.
        name: Name of its recipe.
        chosen: Whether it became the artifact.
        feasible: Whether it keeps all limits.
        verdict: ``keeps all limits``, the limits that it misses, or ``failed``.
        missed: The measures whose limits it misses.
        accuracy: The metric on the search part.
        speedup: Times faster than the original.
        latency: Median latency.
        size: Size on disk.
        memory: Peak memory.
        kept_float: Groups that were kept in FP32.
        seconds: Time that it took.
        failure: Why it could not be built or run.
    """

    number: int
    name: str
    chosen: bool
    feasible: bool
    verdict: str
    missed: str
    accuracy: Cell
    speedup: Cell
    latency: str
    size: str
    memory: str
    kept_float: str
    seconds: str
    failure: str


def candidate_rows(evidence: Evidence) -> list[CandidateRow]:
    """Return the candidates in the order in which they were tried, numbered from 1."""
    return [_candidate_row(evidence, number, item) for number, item in enumerate(evidence.candidates, start=1)]


def _candidate_row(evidence: Evidence, number: int, item: Candidate) -> CandidateRow:
    form = text.accuracy(evidence.metric)
    missed = list(dict.fromkeys(standing.limit.measure for standing in item.standings if not standing.met))
    verdict = f"misses {', '.join(missed)}" if missed else "misses the budget"
    score = Cell(form(item.accuracy, 0), text.interval(item.accuracy_low, item.accuracy_high, form))
    return CandidateRow(
        number=number,
        name=item.name,
        chosen=item.name == evidence.chosen and not item.failure,
        feasible=item.feasible and not item.failure,
        verdict="failed" if item.failure else "keeps all limits" if item.feasible else verdict,
        missed="" if item.failure else ", ".join(missed),
        accuracy=score,
        speedup=ratio_cell(item.speedup, item.speedup_low, item.speedup_high, "faster", "slower"),
        latency=text.quantity(item.latency, "s"),
        size=text.quantity(item.size, "bytes") if item.size else text.MISSING,
        memory=text.quantity(item.memory, "bytes"),
        kept_float=text.MISSING if item.failure else text.integer(item.kept_float),
        seconds=text.quantity(item.seconds, "s"),
        failure=item.failure,
    )

"""What the doctor says, in sentences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from narrowcast.training.doctor.paths import in_words
from narrowcast.training.doctor.values import Cause, Event, EventKind, Part, Remedy, Verdict

__all__ = ["Tally", "cause_sentence"]

_PASSES = {Part.FORWARD: "forward pass", Part.BACKWARD: "backward pass", Part.UPDATE: "update"}
_KINDS = {
    "inf": "the first infinity came",
    "nan": "the first NaN came",
    "zero": "gradients became zero",
    "saturated": "numbers were cut off",
    "stagnant": "weights stopped moving",
}
_MOST = 3  # remedies that a sentence names


def cause_sentence(cause: Cause) -> str:
    """Return a cause as a sentence: step, rank, pass, layer and operator, what was seen, what mends it."""
    if cause.operator == "data":
        where = f"Step {cause.step}, rank {cause.rank}: the data are at fault: {cause.seen}"
    else:
        where = (
            f"Step {cause.step}, rank {cause.rank}: {_KINDS[cause.kind]} in the {_PASSES[cause.part]} of "
            f"{in_words(cause.layer)}: {cause.seen}"
        )
    if not cause.reproduced:
        where += " (seen in the run; the replay was sound)"
    return f"{where}. {_mends(cause.remedies)}"


@dataclass
class _Found:
    first: Event
    times: int = 1


class Tally:
    """What happened so far, by kind and place: the first time of each, and how often it came."""

    def __init__(self) -> None:
        self._found: dict[tuple[object, ...], _Found] = {}
        self._normal = 0  # left-out steps that need nobody's attention

    def add(self, event: Event) -> None:
        """Count what happened."""
        if event.normal:
            self._normal += event.kind is EventKind.BACKOFF
            return
        cause = event.cause
        key = (event.kind, event.rank, cause and (cause.layer, cause.part, cause.operator))
        if key in self._found:
            self._found[key].times += 1
        else:
            self._found[key] = _Found(event)

    def verdict(self, steps: int) -> Verdict:
        """Return the answer.

        Args:
            steps: Updates that were done.
        """
        found = sorted(self._found.values(), key=lambda one: (_unexplained(one.first), one.first.step))
        sentences = list(map(_sentence, found))
        if not found:
            sentences.append(f"Healthy: {steps} steps, every loss and gradient that was used is finite.")
        if self._normal:
            sentences.append(
                f"{self._normal} {'step was' if self._normal == 1 else 'steps were'} left out while the dynamic loss scale was "
                "being found: normal."
            )
        return Verdict(healthy=not found, sentences=tuple(sentences))


def _sentence(found: _Found) -> str:
    again = found.times - 1
    text = found.first.sentence.removesuffix(".") + "."
    return text + (f" It came again {again} {'time' if again == 1 else 'times'}." if again else "")


def _unexplained(event: Event) -> bool:
    return event.kind is EventKind.NONFINITE and event.cause is None


def _mends(remedies: Sequence[Remedy]) -> str:
    good = [one for one in remedies if one.mended]
    bad = [one for one in remedies if not one.mended]
    texts: list[str] = []
    if good:
        texts.append(
            "What mends it, tried: " + "; ".join(f"{one.setting} ({one.evidence})" for one in good[:_MOST]) + "."
        )
    if bad:
        texts.append("Tried, did not mend it: " + "; ".join(one.setting for one in bad[:_MOST]) + ".")
    return " ".join(texts) or "Nothing was tried."

"""What the doctor says, in sentences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from narrowcast.training.doctor.paths import in_words
from narrowcast.training.doctor.values import Cause, Event, EventKind, Part, Remedy, Verdict

__all__ = ["cause_sentence", "verdict"]

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


def verdict(events: Sequence[Event], steps: int) -> Verdict:
    """Return the answer.

    Args:
        events: All that happened.
        steps: Updates that were done.
    """
    faults = [one for one in events if not one.normal]
    sentences = [one.sentence for one in _first_of_each(faults)]
    normal = [one for one in events if one.kind is EventKind.BACKOFF and one.normal]
    if not faults:
        sentences.append(f"Healthy: {steps} steps, every loss and gradient that was used is finite.")
    if normal:
        sentences.append(
            f"{len(normal)} {'step was' if len(normal) == 1 else 'steps were'} left out while the dynamic loss scale was being "
            "found: normal."
        )
    return Verdict(healthy=not faults, sentences=tuple(sentences))


def _first_of_each(faults: Sequence[Event]) -> list[Event]:
    """Return the first event of each kind and place, those with a cause first, and say how often it came again."""
    keys = [(one.kind, one.rank, one.cause and (one.cause.layer, one.cause.part, one.cause.operator)) for one in faults]
    counts = Counter(keys)
    first = dict(reversed(list(zip(keys, faults, strict=True))))
    found: list[Event] = []
    for key, one in sorted(first.items(), key=lambda item: (_unexplained(item[1]), item[1].step)):
        again = counts[key] - 1
        text = one.sentence.removesuffix(".") + "."
        text += f" It came again {again} {'time' if again == 1 else 'times'}." if again else ""
        found.append(one.model_copy(update={"sentence": text}))
    return found


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

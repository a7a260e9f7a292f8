"""Statistics of several replicas as those of one server."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

__all__ = ["merged_statistics"]

Document = dict[str, Any]
#: What identifies a part and is not added up.
_NAMES = frozenset({"name", "version", "batch_size"})
#: Moments, of which the last counts.
_MOMENTS = frozenset({"last_inference"})


def merged_statistics(documents: Iterable[Document]) -> Document:
    """Return the statistics of a model version from those of its replicas; there is at least one.

    Counts and times are added, batch sizes matched, and of moments the last is kept.
    """
    first, *others = documents
    merged = first
    for document in others:
        merged = _added(merged, document)
    return merged


def _added(left: Document, right: Document) -> Document:
    result: Document = {}
    for key in (*left, *(key for key in right if key not in left)):
        if key not in right or key in _NAMES:
            result[key] = left[key]
        elif key not in left:
            result[key] = right[key]
        elif key in _MOMENTS:
            result[key] = max(left[key], right[key])
        elif isinstance(left[key], dict):
            result[key] = _added(left[key], right[key])
        elif isinstance(left[key], list):
            result[key] = _added_batches(cast(list[Document], left[key]), cast(list[Document], right[key]))
        else:
            result[key] = left[key] + right[key]
    return result


def _added_batches(left: list[Document], right: list[Document]) -> list[Document]:
    """Return statistics by batch size."""
    sizes = {batch["batch_size"]: batch for batch in left}
    for batch in right:
        size = batch["batch_size"]
        sizes[size] = _added(sizes[size], batch) if size in sizes else batch
    return [sizes[size] for size in sorted(sizes)]

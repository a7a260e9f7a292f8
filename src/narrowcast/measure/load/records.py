"""What became of each request: when it was due, sent and answered, and how."""

from __future__ import annotations

import csv
import io
import json
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["RECORD", "Outcome", "Records", "as_csv", "as_jsonl", "as_npz", "empty_records", "in_order", "outcome_of"]

Floats = NDArray[np.float64]

#: A structured array with the fields of `RECORD`, shape [requests].
Records = NDArray[np.void]

#: One request. Times are seconds after the start of the run, NaN where it never came to that.
RECORD = np.dtype(
    [
        ("intended", np.float64),  # when it was due; latency counts from here
        ("sent", np.float64),  # when its first byte was handed to the operating system
        ("first", np.float64),  # when the first byte of the answer was there; NaN over gRPC, which does not say
        ("done", np.float64),  # when the answer was complete, or the request given up
        ("status", np.int32),  # HTTP status or gRPC status code; -1: no answer
        ("outcome", np.uint8),  # see Outcome
        ("rows", np.int32),  # rows of its batch
        ("query", np.int64),  # requests of one query count together (multi-stream); else its own number
        ("bytes_sent", np.int64),
        ("bytes_received", np.int64),
    ]
)


class Outcome(IntEnum):
    """How a request ended; only the first kind has a latency."""

    OK = 0
    SHED = 1  # refused for overload: HTTP 429 or 503, gRPC RESOURCE_EXHAUSTED or UNAVAILABLE
    TIMEOUT = 2  # not answered in time, by the client's clock or the server's (HTTP 504, gRPC DEADLINE_EXCEEDED)
    ERROR = 3  # any other refusal
    BROKEN = 4  # no answer: the connection could not be made, or ended
    CUT = 5  # under way when the run was interrupted; it counts only where it was past the bound by then


_HTTP = {200: Outcome.OK, 429: Outcome.SHED, 503: Outcome.SHED, 504: Outcome.TIMEOUT, 408: Outcome.TIMEOUT}
_GRPC = {0: Outcome.OK, 8: Outcome.SHED, 14: Outcome.SHED, 4: Outcome.TIMEOUT}


def outcome_of(status: int, *, grpc: bool = False) -> Outcome:
    """Return what an HTTP status, or a gRPC status code, means for a request."""
    return (_GRPC if grpc else _HTTP).get(status, Outcome.ERROR)


def empty_records(size: int) -> Records:
    """Return records of requests that were not sent."""
    records = np.zeros(size, RECORD)
    for name in ("intended", "sent", "first", "done"):
        records[name] = np.nan
    records["status"] = -1
    records["outcome"] = Outcome.CUT
    records["query"] = np.arange(size)
    return records


def in_order(parts: list[Records]) -> Records:
    """Return the records of several senders as those of one, in the order in which requests were due."""
    whole = np.concatenate(parts) if parts else empty_records(0)
    return whole[np.argsort(whole["intended"], kind="stable")]


# Files ----------------------------------------------------------------------------------------------------------------


def as_csv(records: Records) -> str:
    """Return records as CSV with a head; what is not known is empty, outcomes are words."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = list(records.dtype.names or ())
    writer.writerow(names)
    writer.writerows([row[name] if row[name] is not None else "" for name in names] for row in _rows(records))
    return text.getvalue()


def as_jsonl(records: Records) -> str:
    """Return records as one JSON object a line; what is not known is null, outcomes are words."""
    return "".join(json.dumps(row) + "\n" for row in _rows(records))


def as_npz(records: Records) -> bytes:
    """Return records as a NumPy archive: one array per field, and the names of outcomes."""
    file = io.BytesIO()
    fields: dict[str, Any] = {name: records[name] for name in records.dtype.names or ()}
    np.savez_compressed(file, outcomes=np.array([outcome.name.lower() for outcome in Outcome]), **fields)
    return file.getvalue()


def _rows(records: Records) -> list[dict[str, Any]]:
    names = [outcome.name.lower() for outcome in Outcome]
    columns: dict[str, list[Any]] = {}
    for name in records.dtype.names or ():
        values = records[name]
        if values.dtype.kind == "f":
            columns[name] = [None if value != value else round(value, 9) for value in values.tolist()]
        else:
            columns[name] = values.tolist()
    columns["outcome"] = [names[value] for value in columns["outcome"]]
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

"""What is said when something cannot be written: what it is, why, and what helps against that cause."""

from __future__ import annotations

import errno
import re
from collections.abc import Generator
from contextlib import contextmanager

from safetensors import SafetensorError

from narrowcast.errors import OutputError, TrainingError

__all__ = ["not_written", "written"]

_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def written(what: str, *, elsewhere: str = "name another folder", then: str = "") -> Generator[None]:
    """Turn what the system says of a file into an error that names it, see :func:`not_written`.

    Raises:
        OutputError: No permission, no room, not a folder ...
        TrainingError: The content cannot be stored.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise not_written(what, error, elsewhere=elsewhere, then=then) from error


def not_written(
    what: str, error: BaseException, *, where: str = "", elsewhere: str = "name another folder", then: str = ""
) -> OutputError | TrainingError:
    """Return the error to raise for something that was not written, with the advice that helps against its cause.

    Args:
        what: What should be written, such as ``the log runs/one/log.jsonl``.
        error: What went wrong.
        where: What goes before the reason, such as ``rank 1:`` and a blank.
        elsewhere: What helps against any cause; where the disk is full, so does space.
        then: What else a reader wants to know or do.

    Returns:
        An OutputError where the system did not write; otherwise a TrainingError: the content cannot be stored.
    """
    number = _system_error(error)
    if isinstance(error, FileExistsError | NotADirectoryError):
        reason = "there is a file where a folder should be"
    else:
        reason = (error.strerror if isinstance(error, OSError) else None) or _first_line(error)
    said = f"{what} cannot be written: {where}{reason}"
    if number is None:
        return TrainingError(said, next_step=then)
    advice = f"free space or {elsewhere}" if number in _FULL else elsewhere
    return OutputError(
        said,
        allowed="a folder with permission to write and room for what is written",
        next_step=f"{advice}; {then}" if then else advice,
    )


def _system_error(error: BaseException) -> int | None:
    """Return the number of the system's error, 0 if it has none; None if it was not the system that failed."""
    if isinstance(error, OSError):
        return error.errno or 0
    if not isinstance(error, SafetensorError):
        return None
    said = re.search(r"\(os error (\d+)\)", str(error))
    return int(said[1]) if said else 0


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)

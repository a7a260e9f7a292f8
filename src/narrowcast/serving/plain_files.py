"""Small files that others may have written: read without following links or waiting for pipes."""

from __future__ import annotations

import os
import stat
from pathlib import Path

__all__ = ["NotPlainError", "read_plain"]


class NotPlainError(Exception):
    """A file that cannot be read, or is none; the text says why."""


def read_plain(path: Path, longest: int) -> bytes | None:
    """Return the content of a file, or None where there is none.

    Args:
        path: The file.
        longest: Bytes that it may have.

    Raises:
        NotPlainError: It is a link, no regular file, too long or cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise NotPlainError("it is no regular file")
            text = file.read(longest + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise NotPlainError("it is a link" if path.is_symlink() else error.strerror or str(error)) from error
    if len(text) > longest:
        raise NotPlainError(f"it is longer than {longest} bytes")
    return text

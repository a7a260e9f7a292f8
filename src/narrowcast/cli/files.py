"""Files that commands write: checked before the work, there whole or not at all after it."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import NamedTemporaryFile

from narrowcast.errors import OutputError

__all__ = ["check_file", "write_file"]


def check_file(file: Path, force: bool) -> None:
    """Make sure that a file can be written.

    Args:
        file: Where to.
        force: Whether it may replace one that is there.

    Raises:
        OutputError: It cannot be written, or is there already.
    """
    if file.is_dir():
        raise OutputError(f"output {file} is a folder", allowed="a file", next_step="name a file in it")
    if file.exists() and not force:
        raise OutputError(
            f"output {file} already exists", allowed="a new file", next_step="name another, or replace it with --force"
        )
    if not os.access(file.absolute().parent, os.W_OK):
        raise OutputError(
            f"output {file} cannot be written: no such folder, or no permission", next_step="name another"
        )


def write_file(file: Path, content: str | bytes) -> None:
    """Write a file so that it is there whole or not at all; texts are UTF-8.

    Raises:
        OutputError: It cannot be written.
    """
    partial: Path | None = None
    try:
        with NamedTemporaryFile(dir=file.absolute().parent, prefix=f".{file.name}.", delete=False) as opened:
            partial = Path(opened.name)
            opened.write(content.encode() if isinstance(content, str) else content)
        partial.chmod(0o644)
        partial.replace(file)
        partial = None
    except OSError as error:
        raise OutputError(f"output {file} cannot be written: {error.strerror}", next_step="name another") from error
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)

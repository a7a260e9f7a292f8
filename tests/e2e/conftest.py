"""The command line, run in this process."""

from __future__ import annotations

import pytest

from e2e.command import Cli, Outcome
from narrowcast.cli.app import run_command


@pytest.fixture
def columns() -> int:
    """Width of the terminal that commands print for."""
    return 100


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: int) -> Cli:
    """Run a command as the shell would, and return what it left."""
    monkeypatch.setenv("COLUMNS", str(columns))

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            run_command([*map(str, arguments)])
        printed = capsys.readouterr()
        return Outcome(int(stopped.value.code or 0), printed.out, printed.err)

    return run

"""The folder beside the output in which a run keeps what it has finished, so that it can be resumed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from narrowcast.artifacts.manifest import Candidate, Histogram
from narrowcast.artifacts.store import file_sha256, write_atomic
from narrowcast.errors import NarrowcastError, OutputError
from narrowcast.recipes.plan import Plan
from narrowcast.search.mixed import Diagnosis

__all__ = ["Finished", "Workspace"]


class Finished(BaseModel):
    """A candidate that was built and measured, with its plan and the tensors worth showing."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    candidate: Candidate
    plan: Plan
    histograms: tuple[Histogram, ...] = ()


class _State(BaseModel):
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")

    fingerprint: str
    finished: list[Finished] = Field(default_factory=list[Finished])
    graphs: dict[str, str] = Field(default_factory=dict[str, str])  # candidate to the SHA-256 of its graph
    diagnosis: Diagnosis | None = None


class Workspace:
    """``OUT.work``: graphs of candidates and ``state.json``; removed when the artifact is complete.

    As a context, it is also removed by an error that somebody has to mend before anything was finished: there is nothing
    to go on with.
    """

    def __init__(self, out: Path, fingerprint: dict[str, object]) -> None:
        """Open the folder; what an earlier run of the same request left in it is kept, anything else is removed.

        Args:
            out: The output folder.
            fingerprint: What decides the run's results; runs that agree in it are the same.

        Raises:
            OutputError: The folder cannot be written.
        """
        self.folder = out.with_name(out.name + ".work")
        digest = hashlib.sha256(json.dumps(fingerprint, sort_keys=True, default=str).encode()).hexdigest()
        self.state = self._read(digest)
        if self.state is None:
            self._clear()
            self.state = _State(fingerprint=digest)
            self._save()
        self.resumed = len(self.state.finished)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, NarrowcastError) and not self.finished():
            self.remove()

    def _read(self, digest: str) -> _State | None:
        path = self.folder / "state.json"
        try:
            state = _State.model_validate_json(path.read_bytes())
        except (OSError, ValidationError):
            return None
        return state if state.fingerprint == digest else None

    def _clear(self) -> None:
        if self.folder.exists() and not (self.folder / "state.json").is_file() and any(self.folder.iterdir()):
            raise OutputError(
                f"folder {self.folder} is needed for the run's state and holds other files", next_step="move it"
            )
        try:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
        except OSError as error:
            raise OutputError(
                f"output folder {self.folder.parent} cannot be written: {error.strerror}",
                next_step="name another folder",
            ) from error

    def _save(self) -> None:
        assert self.state is not None
        write_atomic(self.folder / "state.json", self.state.model_dump_json())

    def graph(self, name: str) -> Path:
        """Return the path of a candidate's graph."""
        return self.folder / f"{name}.onnx"

    def finished(self) -> list[Finished]:
        """Return the candidates that are finished, in order."""
        assert self.state is not None
        return list(self.state.finished)

    def find(self, name: str) -> Finished | None:
        """Return a finished candidate by name, if it is, and its graph is still what it was."""
        assert self.state is not None
        done = next((done for done in self.finished() if done.candidate.name == name), None)
        if done is None or done.candidate.failure:
            return done
        intact = self.graph(name).is_file() and file_sha256(self.graph(name)) == self.state.graphs.get(name)
        return done if intact else None

    def finish(self, done: Finished) -> None:
        """Keep a finished candidate."""
        assert self.state is not None
        name = done.candidate.name
        self.state.finished = [d for d in self.state.finished if d.candidate.name != name] + [done]
        if self.graph(name).is_file():
            self.state.graphs[name] = file_sha256(self.graph(name))
        self._save()

    @property
    def diagnosis(self) -> Diagnosis | None:
        """The diagnosis, once it was made."""
        assert self.state is not None
        return self.state.diagnosis

    @diagnosis.setter
    def diagnosis(self, found: Diagnosis) -> None:
        assert self.state is not None
        self.state.diagnosis = found
        self._save()

    def fresh(self, name: str) -> Path:
        """Return an empty folder in the workspace."""
        path = self.folder / f"{name}-{os.getpid()}"
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        return path

    def remove(self) -> None:
        """Remove the workspace."""
        shutil.rmtree(self.folder, ignore_errors=True)

"""How worker processes end: while they start, while they load, while they run; nothing is left and nobody waits."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import uvloop
from serving_models import until, write_artifact

from narrowcast.artifacts.manifest import Manifest
from narrowcast.serving.refusals import WorkerLostError
from narrowcast.serving.workers import link
from narrowcast.serving.workers.arena import Arena, anonymous_file
from narrowcast.serving.workers.base import Batch, Result
from narrowcast.serving.workers.marks import SLOTS, Marks
from narrowcast.serving.workers.process import ProcessWorker

ManifestOf = Callable[..., Manifest]
Run = Callable[[Coroutine[Any, Any, None]], None]

LOOPS = pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])


@pytest.fixture
def folder(tmp_path: Path, manifest_of: ManifestOf) -> Path:
    return write_artifact(tmp_path / "double", manifest_of())


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process is given the time to end by itself: who waits for one that does not is seen to hang."""
    monkeypatch.setattr(link, "_CLOSE_SECONDS", 1000.0)


@pytest.fixture
def endless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Worker processes never get to the end of their load."""
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nexec sleep 1000\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))


def descriptors() -> dict[str, str]:
    """Shared memory of this process, by descriptor."""
    found: dict[str, str] = {}
    for path in Path("/proc/self/fd").iterdir():
        try:
            target = str(path.readlink())
        except FileNotFoundError:
            continue
        if "memfd:narrowcast" in target:
            found[path.name] = target
    return found


def children() -> set[psutil.Process]:
    return set(psutil.Process().children())


def ones() -> Batch:
    return Batch([{"x": np.ones((1, 4), np.float32)}], 1)


@pytest.mark.usefixtures("endless", "patient")
@pytest.mark.parametrize("steps", [0, 1, 2, 3, 200])
@LOOPS
def test_a_start_that_is_broken_off_leaves_nothing(folder: Path, run: Run, steps: int) -> None:
    async def main() -> None:
        before, others = descriptors(), children()
        starting = asyncio.create_task(ProcessWorker(folder).start())
        for _ in range(steps):
            await asyncio.sleep(0.001 if steps > 3 else 0)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(starting, 60)
        await until(lambda: children() <= others)
        assert descriptors() == before

    run(main())


@pytest.mark.usefixtures("patient")
@LOOPS
def test_a_worker_that_is_closed_in_the_middle_of_a_batch_is_not_waited_for(folder: Path, run: Run) -> None:
    async def main() -> None:
        others = children()
        worker = ProcessWorker(folder)
        await worker.start()
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGSTOP)
        came: list[Result] = []
        worker.submit(ones(), came.append)
        await asyncio.wait_for(worker.close(), 60)
        assert isinstance(came[0].error, WorkerLostError)
        assert children() <= others

    run(main())


def test_an_answer_that_cannot_be_read_fails_its_batch_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(self: Arena, placed: object) -> None:
        raise MemoryError("no room for the outputs")

    async def main() -> None:
        worker = ProcessWorker(folder)
        await worker.start()
        pid = worker.pid
        for fails in (True, False):
            came: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
            with monkeypatch.context() as patch:
                if fails:
                    patch.setattr(Arena, "read", no_memory)
                worker.submit(ones(), came.set_result)
                result = await asyncio.wait_for(came, 60)
            assert isinstance(result.error, MemoryError) is fails
        assert worker.pid == pid
        await worker.close()

    asyncio.run(main())


def test_a_process_whose_server_has_gone_while_it_loaded_ends_without_a_word(folder: Path) -> None:
    ours, theirs = socket.socketpair()
    memory = [Marks.create().descriptor, *(anonymous_file() for _ in range(2 * SLOTS))]
    passed = (theirs.fileno(), *memory)
    command = [sys.executable, "-m", "narrowcast.serving.workers.child", *map(str, passed), str(folder)]
    child = subprocess.Popen(command, pass_fds=passed, stderr=subprocess.PIPE, text=True)
    ours.close()
    theirs.close()
    for descriptor in memory:
        os.close(descriptor)
    _, said = child.communicate(timeout=60)
    assert (child.returncode, said) == (0, "")

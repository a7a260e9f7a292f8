"""Kills a process at every instant of a save, and looks at what is left: the old checkpoint or the new one, whole.

An instant is before each call by which Python changes names on the disk, which is all that the disk can show of an instant
except the bytes of a file; within those, the system kills the process when a file reaches a size. Prints outcomes as JSON.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from narrowcast.training import checkpoint

CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}


def state(step: int, written: str) -> dict[str, Any]:
    return {"weights": torch.full((400,), float(step)), "step": step, "written": written}


def kill_before(instant: int) -> None:
    """Kill this process before the n-th call by which Python opens, makes, renames or removes something."""
    passed = 0

    def count(event: str, _: Any) -> None:
        nonlocal passed
        passed += event in CHANGES
        if passed == instant + 1:
            passed += 1
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def dies(work: Callable[[], object]) -> bool:
    """Run work in a child process; whether it was killed."""
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status) and os.waitstatus_to_exitcode(status) != 0:
        raise RuntimeError("the save failed")
    return os.WIFSIGNALED(status)


def at_instant(instant: int, folder: Path, step: int, keep: int) -> bool:
    def work() -> None:
        kill_before(instant)
        checkpoint.save(folder, state(step, "new"), step=step, keep=keep)

    return dies(work)


def at_size(size: int, folder: Path, step: int, keep: int) -> bool:
    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        checkpoint.save(folder, state(step, "new"), step=step, keep=keep)

    return dies(work)


def found(folder: Path) -> str:
    """Return which the last good checkpoint is, after its content was compared."""
    loaded = checkpoint.load_latest(folder)
    if loaded is None:
        return "none"
    expected = state(loaded.step, loaded.state["written"])
    whole = torch.equal(loaded.state.pop("weights"), expected.pop("weights")) and loaded.state == expected
    return f"{loaded.state['written']} {loaded.step}" if whole else "mixed"


def outcomes(die: Callable[[int, Path, int, int], bool], points: Any, start: Path, step: int, keep: int) -> list[Any]:
    """Return for each point: what was found after the kill, and what after the next save in the same folder."""
    seen: list[Any] = []
    for point in points:
        folder = start.with_name("killed")
        shutil.copytree(start, folder)
        killed = die(point, folder, step, keep)
        first = found(folder)
        checkpoint.save(folder, state(step + 1, "next"), step=step + 1, keep=keep)
        names = sorted(path.name for path in folder.iterdir())
        seen.append({"killed": killed, "found": first, "next": found(folder), "left": names})
        shutil.rmtree(folder)
        if not killed:
            break
    return seen


def main(place: Path) -> None:
    torch.set_num_threads(1)
    start = place / "start"
    for step in (1, 2, 3):
        checkpoint.save(start, state(step, "old"), step=step, keep=2)
    many = range(10_000)
    result = {
        "next": outcomes(at_instant, many, start, step=4, keep=2),
        "same": outcomes(at_instant, many, start, step=3, keep=1),
        "earlier": outcomes(at_instant, many, start, step=2, keep=2),
        "bytes": outcomes(at_size, (0, 1, 7, 8, 100, 600, 1500, 10_000), start, step=4, keep=2),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

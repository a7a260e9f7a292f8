"""Models that do not come back: their batches are ended, their workers replaced, and other models do not notice."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from serving_models import FOURS, Gate, function, until, write_artifact

from narrowcast.artifacts.manifest import Manifest
from narrowcast.serving.catalogue import Catalogue, Hosting
from narrowcast.serving.refusals import Refusal
from narrowcast.serving.repository import Repository
from narrowcast.serving.scheduling.queue import Batching, Job
from narrowcast.serving.scheduling.scheduler import Scheduler, Settings
from narrowcast.serving.workers.inline import ThreadWorker
from narrowcast.serving.workers.loading import FunctionModel
from narrowcast.serving.workers.process import ProcessWorker
from narrowcast.serving.workers.sources import Placement

ManifestOf = Callable[..., Manifest]
LIMIT = 0.3


def ask(catalogue: Catalogue, model: str, rows: int = 1) -> Job:
    return catalogue.find(model).scheduler.submit({"x": np.ones((rows, 4), np.float32)}, rows)


def pids(catalogue: Catalogue, folder: Path) -> list[int]:
    children = psutil.Process().children()
    return [child.pid for child in children if child.is_running() and str(folder) in child.cmdline()]


def test_a_process_that_hangs_is_ended_and_replaced_and_other_models_go_on(
    tmp_path: Path, manifest_of: ManifestOf
) -> None:
    for name, factor in (("hung", 2.0), ("other", 5.0)):
        write_artifact(tmp_path / name / "1" / "artifact", manifest_of(), factor)

    async def main() -> None:
        hosting = Hosting(Placement.PROCESS, settings=Settings(Batching(8), batch_timeout=LIMIT))
        catalogue = Catalogue(Repository([tmp_path]), hosting)
        await catalogue.load_all()
        hung = catalogue.find("hung").scheduler
        (pid,) = pids(catalogue, tmp_path / "hung" / "1" / "artifact")
        os.kill(pid, signal.SIGSTOP)
        running = ask(catalogue, "hung")
        waiting = ask(catalogue, "hung")
        other = ask(catalogue, "other")
        await until(lambda: other.finished)
        assert other.outputs is not None
        assert not running.finished
        await until(lambda: running.finished)
        assert isinstance(running.error, Refusal)
        assert running.error.status == 504
        assert "ran longer than 0.3 s" in running.error.message
        await until(lambda: waiting.finished)
        assert isinstance(waiting.error, Refusal)
        assert waiting.error.status == 503
        assert not catalogue.ready
        with pytest.raises(Refusal, match="no worker of the model is alive"):
            ask(catalogue, "hung")
        await until(lambda: hung.workers_alive == 1)
        assert not psutil.pid_exists(pid)
        again = ask(catalogue, "hung")
        await until(lambda: again.finished)
        assert again.outputs is not None
        assert hung.statistics.overruns == 1
        assert catalogue.ready
        await catalogue.close()

    asyncio.run(main())


def test_a_model_that_hangs_every_time_comes_back_later_every_time(
    tmp_path: Path, manifest_of: ManifestOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("narrowcast.serving.workers.process._GROWN_UP_SECONDS", 0.0)
    folder = write_artifact(tmp_path / "hung", manifest_of())

    async def main() -> None:
        worker = ProcessWorker(folder)
        await worker.start()
        scheduler = Scheduler([worker], Settings(batch_timeout=0.05))
        deaths: list[int] = []
        for _ in range(3):
            assert worker.pid is not None
            os.kill(worker.pid, signal.SIGSTOP)
            job = scheduler.submit({"x": np.ones((1, 4), np.float32)}, 1)
            await until(lambda job=job: job.finished and scheduler.workers_alive == 0)
            deaths.append(worker._deaths)
            await until(lambda: scheduler.workers_alive == 1)
        assert deaths == [1, 2, 3], "old as it may be, it never answered"
        job = scheduler.submit({"x": np.ones((1, 4), np.float32)}, 1)
        await until(lambda: job.finished)
        assert job.outputs is not None
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)
        await until(lambda: scheduler.workers_alive == 0)
        assert worker._deaths == 0
        await scheduler.close()

    asyncio.run(main())


def test_a_thread_that_hangs_is_down_until_it_comes_back() -> None:
    gate = Gate()

    async def main() -> None:
        worker = ThreadWorker(lambda: FunctionModel(FOURS, gate))
        await worker.start()
        scheduler = Scheduler([worker], Settings(Batching(8), batch_timeout=0.1))
        hung = scheduler.submit({"x": np.ones((1, 4), np.float32)}, 1)
        await until(lambda: hung.finished)
        assert isinstance(hung.error, Refusal)
        assert hung.error.status == 504
        assert scheduler.workers_alive == 0
        await asyncio.wait_for(scheduler.drained(), 5)
        gate.open.release()
        await until(lambda: scheduler.workers_alive == 1)
        gate.open.release()
        again = scheduler.submit({"x": np.ones((1, 4), np.float32)}, 1)
        await until(lambda: again.finished)
        assert again.outputs is not None
        assert len(gate.ran) == 2, "the batch that was too late is not run again"
        assert scheduler.statistics.executions == 1
        await scheduler.close()

    asyncio.run(main())


def test_batches_that_are_quick_enough_are_left_alone() -> None:
    async def main() -> None:
        catalogue = Catalogue(
            Repository(sources={"model": function(lambda inputs: time.sleep(0.02) or {"y": inputs["x"]})}),
            Hosting(Placement.THREAD, settings=Settings(Batching(1), batch_timeout=0.5)),
        )
        await catalogue.load_all()
        jobs = [ask(catalogue, "model") for _ in range(50)]  # together they take twice as long as one may
        await until(lambda: jobs[-1].finished)
        assert all(job.outputs is not None for job in jobs)
        assert catalogue.find("model").scheduler.statistics.overruns == 0
        await catalogue.close()

    asyncio.run(main())


def test_each_of_two_workers_has_its_own_time() -> None:
    release = threading.Event()

    def sometimes(inputs: dict[str, Any]) -> dict[str, Any]:
        if inputs["x"][0, 0] < 0:
            release.wait(30)
        return {"y": inputs["x"]}

    async def main() -> None:
        workers = [ThreadWorker(lambda: FunctionModel(FOURS, sometimes)) for _ in range(2)]
        for worker in workers:
            await worker.start()
        scheduler = Scheduler(workers, Settings(Batching(1), batch_timeout=0.2))
        bad = scheduler.submit({"x": -np.ones((1, 4), np.float32)}, 1)
        good = [scheduler.submit({"x": np.ones((1, 4), np.float32)}, 1) for _ in range(10)]
        await until(lambda: bad.finished)
        assert isinstance(bad.error, Refusal)
        assert all(job.outputs is not None for job in good)
        assert scheduler.workers_alive == 1
        release.set()
        await until(lambda: scheduler.workers_alive == 2)
        await scheduler.close()

    asyncio.run(main())

"""A worker that cannot come back is tried less and less often."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from serving_models import until, write_artifact

from narrowcast.artifacts.manifest import Manifest
from narrowcast.serving.workers.process import ProcessWorker

ManifestOf = Callable[..., Manifest]


def test_each_try_waits_twice_as_long_as_the_one_before(
    tmp_path: Path, manifest_of: ManifestOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_artifact(tmp_path / "double", manifest_of())
    waits: list[float] = []
    sleep = asyncio.sleep

    async def short(seconds: float) -> None:
        if seconds >= 0.1:  # the waits of the test itself are shorter
            waits.append(seconds)
        await sleep(min(seconds, 0.01))

    async def main() -> None:
        worker = ProcessWorker(folder)
        await worker.start()
        assert worker.pid is not None
        (folder / "model.onnx").write_bytes(b"damaged")
        monkeypatch.setattr(asyncio, "sleep", short)
        psutil.Process(worker.pid).kill()
        await until(lambda: len(waits) >= 4)
        await worker.close()

    asyncio.run(main())
    assert waits[:4] == [0.2, 0.4, 0.8, 1.6]

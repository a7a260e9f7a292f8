"""Loads that do not end: they are broken off in time, and who wants to change the model meanwhile is told so."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from serving_models import FOURS, doubled, function, request, until, write_artifact

from narrowcast.artifacts.manifest import Manifest
from narrowcast.serving.catalogue import Catalogue, Hosting
from narrowcast.serving.refusals import LoadTimeoutError, ModelBusyError, Refusal
from narrowcast.serving.repository import Repository
from narrowcast.serving.workers.base import LoadedModel
from narrowcast.serving.workers.loading import FunctionModel
from narrowcast.serving.workers.sources import FunctionSource, Placement

DEMAND = Hosting(Placement.THREAD, on_demand=True)
ManifestOf = Callable[..., Manifest]


class Hanging:
    """A source whose loads wait for an event, and are counted."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.loads = 0
        self.source = FunctionSource(self._load)

    def _load(self) -> LoadedModel:
        self.loads += 1
        assert self.go.wait(30)
        return FunctionModel(FOURS, doubled)


@pytest.mark.parametrize("change", ["load", "unload", "rollback"])
def test_a_change_during_a_load_without_end_is_told_so_and_not_made(change: str) -> None:
    model = Hanging()

    async def main() -> None:
        catalogue = Catalogue(Repository(sources={"m": model.source}), DEMAND, patience=0.05)
        await catalogue.load_all()
        waiting = [asyncio.create_task(catalogue.get("m")) for _ in range(20)]
        await until(lambda: model.loads == 1)
        with pytest.raises(ModelBusyError) as caught:
            await getattr(catalogue, change)("m")
        assert "model 'm' is being changed by somebody else: version 1 is being loaded" in caught.value.what
        assert "--load-timeout" in caught.value.next_step
        model.go.set()
        served = await asyncio.gather(*waiting)
        assert (len({id(item) for item in served}), model.loads) == (1, 1), "one load, however many wait"
        await catalogue.unload("m")
        assert catalogue.names == []
        await catalogue.close()

    asyncio.run(main())


def test_a_load_without_end_is_broken_off_and_holds_nothing() -> None:
    model = Hanging()

    async def main() -> None:
        catalogue = Catalogue(Repository(sources={"m": model.source}), DEMAND, load_timeout=0.1)
        await catalogue.load_all()
        outcomes = await asyncio.gather(*(catalogue.get("m") for _ in range(20)), return_exceptions=True)
        assert model.loads == 1
        assert {outcome.status for outcome in outcomes if isinstance(outcome, Refusal)} == {503}
        assert {str(outcome) for outcome in outcomes} == {
            "model 'm' version 1 cannot be loaded: model 'm' version 1 was not loaded within 0.1 s, and its load was broken off"
        }
        (entry,) = catalogue.index()
        assert (entry.state, "not loaded within 0.1 s" in entry.reason) == ("UNAVAILABLE", True)
        with pytest.raises(LoadTimeoutError):
            await catalogue.load("m")
        model.go.set()
        await catalogue.load("m")
        assert catalogue.find("m").version == "1"
        await catalogue.close()

    asyncio.run(main())


def test_what_was_served_goes_on_while_a_new_load_hangs_and_after_it() -> None:
    model = Hanging()
    model.go.set()

    async def main() -> None:
        catalogue = Catalogue(Repository(sources={"m": model.source}), Hosting(Placement.THREAD), load_timeout=0.2)
        await catalogue.load_all()
        before = catalogue.find("m")
        model.go.clear()
        reload = asyncio.create_task(catalogue.load("m"))
        await until(lambda: model.loads == 2)
        assert catalogue.find("m") is before
        with pytest.raises(LoadTimeoutError, match="not loaded within"):
            await reload
        assert catalogue.find("m") is before
        assert before.scheduler.workers_alive == 1
        model.go.set()
        await catalogue.close()

    asyncio.run(main())


def test_administrators_are_answered_with_a_status_and_what_to_do(serve: Any) -> None:
    model = Hanging()
    model.go.set()
    running = serve({"m": model.source, "other": function()}, load_timeout=0.4)
    running.server.catalogue.patience = 0.05
    model.go.clear()
    answers: list[Any] = []
    first = threading.Thread(target=lambda: answers.append(running.admin("m/load")))
    first.start()
    running.call(until(lambda: model.loads == 2))
    busy = running.admin("m/unload")
    assert (busy.status, busy.headers["Retry-After"]) == (503, "1")
    assert "is being changed by somebody else" in busy.error
    assert "Next: ask again later" in busy.error
    assert running.admin("other/load").status == 200, "other models go on"
    assert running.infer("m", request(1)).status == 200, "and so does what was served"
    first.join(30)
    assert answers[0].status == 504
    assert "not loaded within 0.4 s" in answers[0].error
    assert "--load-timeout" in answers[0].error
    model.go.set()
    assert running.admin("m/unload").status == 200


def test_a_process_that_hangs_as_it_loads_is_ended(tmp_path: Path, manifest_of: ManifestOf) -> None:
    write_artifact(tmp_path / "m" / "1" / "artifact", manifest_of())

    async def main() -> None:
        catalogue = Catalogue(Repository([tmp_path]), Hosting(Placement.PROCESS), load_timeout=1.0)
        before = set(psutil.Process().children())
        loading = asyncio.create_task(catalogue.load("m"))
        await until(lambda: bool(set(psutil.Process().children()) - before))
        (worker,) = set(psutil.Process().children()) - before
        worker.suspend()  # long before it has imported what it loads the model with
        with pytest.raises(LoadTimeoutError, match="model 'm' version 1 was not loaded within 1 s"):
            await loading
        assert not worker.is_running()
        await catalogue.close()

    asyncio.run(main())

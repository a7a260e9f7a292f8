"""What the Ray engine does without Ray: keeper, ingress and replicas in one process, and what goes between them pickled."""

from __future__ import annotations

import asyncio
import json
import pickle
import re
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc.service_pb2 as triton
from serving_models import request, write_artifact
from test_status_page import browse, words

from narrowcast.artifacts.manifest import Manifest
from narrowcast.errors import ArtifactError, ConfigError, RuntimeFailedError
from narrowcast.oip.messages import HEALTH
from narrowcast.recipes.target import Target
from narrowcast.serving.hosting import Hosting
from narrowcast.serving.http.message import Request, Response, refused
from narrowcast.serving.http.server import HttpServer
from narrowcast.serving.limits import Limits
from narrowcast.serving.ray.counting import Ledger, total
from narrowcast.serving.ray.ingress import Ingress
from narrowcast.serving.ray.keeper import Keeper
from narrowcast.serving.ray.metrics import ClusterMetrics
from narrowcast.serving.ray.plan import PlannedVersion, Scale, check_places, planned_version
from narrowcast.serving.ray.replica import ModelReplica
from narrowcast.serving.ray.rpc import add_service, split_deadline
from narrowcast.serving.ray.wire import Call, CallAnswer, Keeping, Refused, Remote, Report, Table
from narrowcast.serving.refusals import Refusal
from narrowcast.serving.repository import VersionPolicy
from narrowcast.serving.rpc.service import SERVICE
from narrowcast.serving.scheduling.queue import Batching
from narrowcast.serving.scheduling.scheduler import Settings
from narrowcast.serving.scheduling.statistics import Statistics
from narrowcast.serving.server import ServerOptions
from narrowcast.serving.signature import Signature
from narrowcast.serving.state import ModelState, write_state
from narrowcast.serving.workers.sources import Placement

ManifestOf = Callable[..., Manifest]
ALL = Hosting(settings=Settings(Batching(4)), policy=VersionPolicy(latest=0))
TOKEN = {"authorization": "Bearer secret"}


@pytest.fixture
def models(tmp_path: Path, manifest_of: ManifestOf) -> Path:
    """Model ``scale``, whose version 1 doubles and version 2 triples, and model ``other``, which multiplies by 5."""
    for name, version, factor in (("scale", 1, 2.0), ("scale", 2, 3.0), ("other", 1, 5.0)):
        manifest = manifest_of(target=Target(threads=version))
        write_artifact(tmp_path / "models" / name / str(version) / "artifact", manifest, factor)
    return tmp_path / "models"


def sent(value: Any) -> Any:
    """Return what another process would get."""
    return pickle.loads(pickle.dumps(value))


class Copies(Remote):
    """Several replicas in this process, asked in turn; what goes to them and comes from them is pickled, as by Ray."""

    def __init__(self, key: str, planned: PlannedVersion, replicas: list[ModelReplica]) -> None:
        self.name = key
        self.planned = planned
        self.replicas = replicas
        self.turn = 0
        self.hold: asyncio.Event | None = None
        self.ended = False

    @property
    def key(self) -> str:
        return self.name

    def next(self) -> ModelReplica:
        assert not self.ended, "a request has come after the end"
        if not self.replicas:
            raise Refusal(503, "no replica of the model can take the request", retry_after=1)
        self.turn += 1
        return self.replicas[self.turn % len(self.replicas)]

    async def ask(self, request: Request) -> Response:
        if self.hold is not None:
            await self.hold.wait()
        return sent(await self.next().ask(sent(request)))

    async def call(self, call: Call) -> CallAnswer:
        return sent(await self.next().call(sent(call)))

    async def signature(self) -> Signature:
        return sent(self.next().signature())

    async def reports(self) -> list[Report]:
        return sent([replica.report() for replica in self.replicas])

    async def close(self) -> None:
        pass


class LocalFleet:
    """A cluster in this process."""

    def __init__(self) -> None:
        self.remotes: list[Copies] = []
        self.broken: set[int] = set()
        self.burning: set[str] = set()
        self.keeper: Keeper | None = None
        self.hold = asyncio.Event()
        self.hold.set()
        self.starting = 0
        self.swept = False

    async def inherit(self) -> None:
        """Nothing runs there already."""

    async def sweep(self) -> None:
        self.swept = True

    async def deploy(self, planned: PlannedVersion) -> Remote:
        self.starting += 1
        try:
            await self.hold.wait()
        finally:
            self.starting -= 1
        if planned.version in self.broken or planned.name in self.burning:
            raise RuntimeFailedError("the machines are on fire")
        key = f"{planned.name}-{planned.version}-{len(self.remotes)}"
        started = [await ModelReplica.started(sent(planned), f"{key}-{copy}") for copy in range(planned.fewest)]
        self.remotes.append(Copies(key, planned, started))
        return self.remotes[-1]

    async def remove(self, remote: Remote) -> None:
        assert isinstance(remote, Copies)
        remote.ended = True
        assert self.keeper is not None
        for replica in remote.replicas:
            await replica.stop()
            self.keeper.farewell(remote.planned.name, remote.planned.version, sent(replica.report()))

    def running(self, name: str, version: int) -> Copies:
        """Return the replicas of a version that were started last."""
        found = [remote for remote in self.remotes if (remote.planned.name, remote.planned.version) == (name, version)]
        return found[-1]


def unrefused(answer: Any) -> Any:
    if isinstance(answer, Refused):
        raise answer.refusal()
    return answer


class DirectKeeping(Keeping):
    """The keeper in this process, or none at all."""

    def __init__(self, keeper: Keeper) -> None:
        self.keeper: Keeper | None = keeper

    def here(self) -> Keeper:
        if self.keeper is None:
            raise Refusal(503, "the keeper cannot be reached", retry_after=1)
        return self.keeper

    async def ask(self, request: Request) -> Response:
        return unrefused(sent(await self.here().ask(sent(request))))

    async def call(self, call: Call) -> CallAnswer:
        return unrefused(sent(await self.here().call(sent(call))))

    async def wake(self, name: str, version: str) -> Table:
        return unrefused(await self.here().wake(name, version))

    async def follow(self, who: str, applied: int, settled: int) -> Table | None:
        return await self.here().follow(who, applied, settled)


class Asked:
    """A keeper with its replicas, and ingresses before them."""

    def __init__(self, keeper: Keeper, fleet: LocalFleet) -> None:
        self.keeper = keeper
        self.fleet = fleet
        self.keeping = DirectKeeping(keeper)
        self.ingresses: list[Ingress] = []
        self.add()

    def add(self) -> None:
        draws = iter([0.05, 0.95, 0.5] * 1000)
        self.ingresses.append(Ingress(self.keeping, Limits(), lambda: next(draws)))

    async def ask(
        self, method: str, target: str, body: bytes = b"", through: int = 0, **headers: str
    ) -> tuple[int, Any]:
        named = {name.replace("_", "-").lower().encode(): value.encode() for name, value in headers.items()}
        try:
            outcome = self.ingresses[through].handle(Request(method.encode(), target.encode(), named, body))
            response = outcome if isinstance(outcome, Response) else await outcome
        except Refusal as refusal:
            response = refused(refusal)
        joined = b"".join(response.body)
        return response.status, json.loads(joined) if joined.startswith((b"{", b"[")) else joined

    async def change(self, target: str, body: bytes = b"") -> Any:
        status, document = await self.ask("POST", f"/v2/repository/models/{target}", body, **TOKEN)
        return document.get("traffic") if status == 200 else (status, document["error"])

    async def infer(self, target: str, through: int = 0) -> Any:
        status, document = await self.ask("POST", f"/v2/models/{target}/infer", request(1.0), through)
        return document["outputs"][0]["data"][0] if status == 200 else (status, document["error"])

    async def call(self, method: str, message: Any, metadata: tuple[tuple[str, str], ...] = ()) -> CallAnswer:
        return await self.ingresses[0].call(Call(method, message.SerializeToString(), metadata))


async def until(condition: Callable[[], bool]) -> None:
    """Return when something has come to pass."""
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


def with_keeper(
    places: Path,
    check: Callable[[Asked], Coroutine[Any, Any, None]],
    hosting: Hosting = ALL,
    token: str | None = "secret",
) -> None:
    """Run a check on an ingress before the replicas of a repository."""

    async def run() -> None:
        fleet = LocalFleet()
        keeper = fleet.keeper = Keeper([places], hosting, ServerOptions(token=token, grace=5.0), fleet)
        await keeper.start()
        asked = Asked(keeper, fleet)
        try:
            await check(asked)
        finally:
            for ingress in asked.ingresses:
                await ingress.stop()
            await keeper.stop()

    asyncio.run(run())


# the plan -------------------------------------------------------------------------------------------------------------


def test_a_replica_runs_one_worker_in_a_thread(models: Path) -> None:
    folder = models / "scale" / "2" / "artifact"
    version = planned_version("scale", 2, folder, replace(ALL, workers=3), Limits(), 5.0)
    assert (version.threads, version.fewest, version.ongoing) == (2, 3, 1024 + 4)
    assert version.hosting == replace(ALL, placement=Placement.THREAD, workers=1)
    assert sent(version) == version


def test_what_cannot_be_deployed_is_refused(models: Path, tmp_path: Path) -> None:
    assert check_places([models], ALL, Scale(most=2)) == ["other", "scale"]
    with pytest.raises(ConfigError, match="none of the versions"):
        check_places([models], replace(ALL, policy=VersionPolicy(named=(5,))), Scale())
    (models / "other" / "serving.json").write_text(json.dumps({"workers": 7}))
    with pytest.raises(ConfigError, match="'other' has 7 workers at least and 2 at most"):
        check_places([models], ALL, Scale(most=2))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match="no model"):
        check_places([tmp_path / "empty"], ALL, Scale())
    graph = models / "other" / "1" / "artifact" / "model.onnx"
    graph.write_bytes(graph.read_bytes() + b"x")
    with pytest.raises(ArtifactError, match="damaged"):
        check_places([models], ALL, Scale())


def test_promotions_and_files_of_options_are_kept_to(models: Path) -> None:
    write_state(models, "scale", ModelState(traffic={1: 1.0}))
    (models / "other" / "serving.json").write_text(json.dumps({"workers": 2}))

    async def check(asked: Asked) -> None:
        assert await asked.infer("scale") == 2.0
        assert len(asked.fleet.running("other", 1).replicas) == 2
        assert (await asked.ask("GET", "/v2/models/other/config"))[1]["instance_group"][0]["count"] == 2

    with_keeper(models, check)


# the ingress ----------------------------------------------------------------------------------------------------------


def test_requests_go_to_their_model_and_version(models: Path) -> None:
    async def check(asked: Asked) -> None:
        assert await asked.infer("other") == 5.0
        assert await asked.infer("scale") == 3.0
        assert await asked.infer("scale/versions/1") == 2.0
        assert await asked.infer("sc%61le") == 3.0
        assert await asked.infer("scale/versions/9") == (404, "model 'scale' has no version '9' loaded; allowed: 1, 2")
        assert await asked.infer("scale/versions/x") == (404, "model 'scale' has no version 'x' loaded; allowed: 1, 2")
        assert await asked.infer("none") == (404, "model 'none' is not found: unknown")
        status, document = await asked.ask("GET", "/v2/models/scale/versions/1")
        assert (status, document["name"], document["versions"]) == (200, "scale", ["1", "2"])
        assert (await asked.ask("GET", "/v2/models/scale/config"))[1]["max_batch_size"] == 4
        assert (await asked.ask("POST", "/v2/models/other/infer", b"{"))[0] == 400
        assert (await asked.ask("GET", "/v2/models/other/infer"))[0] == 405
        assert (await asked.ask("GET", "/v2/models/other/ready"))[0] == 200

    with_keeper(models, check)


def test_a_split_that_is_remembered_is_drawn_for_each_request(models: Path) -> None:
    write_state(models, "scale", ModelState(traffic={1: 1.0, 2: 9.0}))

    async def check(asked: Asked) -> None:
        await asked.infer("other")  # from now on the ingress has the table
        assert [await asked.infer("scale") for _ in range(3)] == [2.0, 3.0, 3.0]

    with_keeper(models, check)


def test_what_no_model_is_asked_is_answered_for_all(models: Path) -> None:
    async def check(asked: Asked) -> None:
        assert (await asked.ask("GET", "/v2"))[1]["name"] == "narrowcast"
        assert (await asked.ask("GET", "/v2/health/live"))[0] == 200
        assert (await asked.ask("GET", "/v2/health/ready"))[0] == 200
        assert (await asked.ask("GET", "/elsewhere"))[0] == 404
        assert (await asked.ask("DELETE", "/v2/health/ready"))[0] == 405
        entries = (await asked.ask("POST", "/v2/repository/index"))[1]
        assert [(entry["name"], entry["version"], entry["state"]) for entry in entries] == [
            ("other", "1", "READY"),
            ("scale", "1", "READY"),
            ("scale", "2", "READY"),
        ]
        gone = asked.fleet.running("scale", 1).replicas
        kept, gone[:] = gone[:], []
        await asked.keeper.look()
        assert (await asked.ask("GET", "/v2/health/ready"))[0] == 503
        ready = (await asked.ask("POST", "/v2/repository/index", b'{"ready": true}'))[1]
        assert [entry["name"] + entry["version"] for entry in ready] == ["other1", "scale2"]
        assert (await asked.ask("POST", "/v2/repository/index", b"[]"))[0] == 400
        assert (await asked.infer("scale/versions/1"))[0] == 503
        assert await asked.infer("scale") == 3.0
        gone[:] = kept
        await asked.keeper.look()
        assert (await asked.ask("GET", "/v2/health/ready"))[0] == 200

    with_keeper(models, check)


def test_without_a_keeper_loaded_models_are_served_on(models: Path) -> None:
    async def check(asked: Asked) -> None:
        await asked.ingresses[0].informed()
        kept, asked.keeping.keeper = asked.keeping.keeper, None
        assert await asked.infer("scale") == 3.0, "no request had come while the keeper was there"
        assert (await asked.ask("GET", "/v2/health/live"))[0] == 200
        assert (await asked.ask("GET", "/v2/models/scale"))[0] == 503
        assert await asked.change("scale/load") == (503, "the keeper cannot be reached")
        load = await asked.call("RepositoryModelLoad", triton.RepositoryModelLoadRequest(model_name="scale"))
        assert (load.code, load.trailing) == ("UNAVAILABLE", (("retry-after", "1"),))
        assert await ready(asked) == (200, True), "it answers all that it is there for"
        assert (await asked.ask("POST", "/v2/health/ready"))[0] == 503
        gone = asked.fleet.running("scale", 1).replicas
        replicas, gone[:] = gone[:], []
        assert await ready(asked) == (503, False)
        gone[:] = replicas
        asked.add()
        informed = asyncio.ensure_future(asked.ingresses[1].informed())
        await asyncio.sleep(0.05)
        assert not informed.done(), "an ingress that knows nothing gets no requests"
        assert await ready(asked, 1) == (503, False)
        asked.keeping.keeper = kept
        await informed
        assert await asked.infer("scale", 1) == 3.0

    with_keeper(models, check)


async def ready(asked: Asked, through: int = 0) -> tuple[int, bool]:
    """Return what an ingress says of itself over REST, and over gRPC."""
    status, _ = await asked.ask("GET", "/v2/health/ready", through=through)
    answer = await asked.ingresses[through].call(Call("ServerReady", b""))
    return status, triton.ServerReadyResponse.FromString(answer.message).ready


@pytest.mark.parametrize("ahead", [False, True], ids=["later", "clock-behind"])
def test_the_next_keeper_is_followed_when_it_has_loaded(
    models: Path, monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    async def check(asked: Asked) -> None:
        assert await asked.infer("scale") == 3.0
        asked.keeping.keeper = None
        asked.fleet.hold.clear()
        if ahead:
            monkeypatch.setattr(time, "time_ns", lambda: 5)
        following = Keeper([models], ALL, ServerOptions(token="secret", grace=5.0), asked.fleet)
        starting = asyncio.ensure_future(following.start())
        asked.keeping.keeper = following
        for said in (await asked.change("scale/load"), await asked.infer("none")):
            assert said == (503, "the models are being loaded; those that were loaded before are served on")
        assert await ready(asked) == (200, True)
        assert await asked.infer("scale") == 3.0
        old = asked.fleet.running("scale", 2)
        old.hold = asyncio.Event()
        held = asyncio.ensure_future(asked.infer("scale"))
        await until(lambda: bool(following._followers))
        asked.fleet.hold.set()
        assert await starting == {}
        sweeping = asyncio.ensure_future(following.sweep())
        await following._followed(following._table.revision)
        assert await asked.infer("scale") == 3.0
        assert asked.fleet.running("scale", 2) is not old
        await asyncio.sleep(0.2)
        assert not sweeping.done(), "a request is under way to what the keeper before had"
        assert not held.done()
        old.hold.set()
        assert await held == 3.0
        await sweeping
        assert asked.fleet.swept
        asked.add()
        assert await asked.change("scale/versions/1/promote") == {"1": 1.0}
        assert [await asked.infer("scale", through) for through in (0, 1)] == [2.0, 2.0]
        await following.stop()

    with_keeper(models, check)


# starting -------------------------------------------------------------------------------------------------------------


def test_models_are_loaded_side_by_side_and_one_that_fails_leaves_the_others_alone(models: Path) -> None:
    async def check() -> None:
        fleet = LocalFleet()
        keeper = fleet.keeper = Keeper([models], ALL, ServerOptions(grace=5.0), fleet)
        fleet.burning.add("scale")
        fleet.hold.clear()
        starting = asyncio.ensure_future(keeper.start())
        await until(lambda: fleet.starting == 2)
        fleet.hold.set()
        assert await starting == {"scale": "the machines are on fire"}
        asked = Asked(keeper, fleet)
        assert await asked.infer("other") == 5.0
        assert await asked.infer("scale") == (404, "model 'scale' is not found: not loaded")
        index = (await asked.ask("POST", "/v2/repository/index"))[1]
        assert [entry.get("reason", "") for entry in index] == ["", "the machines are on fire", "not loaded"]
        assert (await asked.ask("GET", "/v2/health/ready"))[0] == 200
        await asked.ingresses[0].stop()
        await keeper.stop()

    asyncio.run(check())


def test_a_start_that_loads_nothing_fails(models: Path) -> None:
    async def check() -> None:
        fleet = LocalFleet()
        keeper = fleet.keeper = Keeper([models], ALL, ServerOptions(grace=5.0), fleet)
        fleet.burning.update({"scale", "other"})
        with pytest.raises(RuntimeFailedError, match="on fire"):
            await keeper.start()
        await keeper.stop()

    asyncio.run(check())


def test_the_end_of_a_start_is_the_end_of_all_its_loads(models: Path) -> None:
    async def check() -> None:
        fleet = LocalFleet()
        keeper = fleet.keeper = Keeper([models], ALL, ServerOptions(grace=5.0), fleet)
        fleet.hold.clear()
        starting = asyncio.ensure_future(keeper.start())
        await until(lambda: fleet.starting == 2)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        await keeper.stop()
        assert fleet.starting == 0
        assert fleet.remotes == []

    asyncio.run(check())


# changes --------------------------------------------------------------------------------------------------------------


def test_changes_are_in_force_everywhere_when_they_are_answered(models: Path) -> None:
    async def check(asked: Asked) -> None:
        asked.add()

        async def both(target: str = "scale") -> list[Any]:
            return [await asked.infer(target, through) for through in (0, 1)]

        assert await both() == [3.0, 3.0]
        assert await asked.change("scale/versions/1/promote") == {"1": 1.0}
        assert await both() == [2.0, 2.0]
        asked.add()
        assert await asked.infer("scale", 2) == 2.0, "a new ingress starts with what holds now"
        assert await asked.change("scale/rollback") == {"2": 1.0}
        assert await both() == [3.0, 3.0]
        assert await asked.change("scale/traffic", b'{"weights": {"1": 1, "2": 9}}') == {"1": 0.1, "2": 0.9}
        assert {await asked.infer("scale", 1) for _ in range(9)} == {2.0, 3.0}
        assert (await asked.ask("GET", "/v2/repository/models/scale/traffic"))[1] == {"traffic": {"1": 0.1, "2": 0.9}}
        assert await asked.change("scale/unload") == {}
        assert await both() == [(404, "model 'scale' is not found: not loaded")] * 2
        assert await asked.change("scale/load") == {"2": 1.0}
        assert await both() == [3.0, 3.0]
        assert (await asked.change("scale/versions/7/promote"))[0] == 404
        assert await both("other") == [5.0, 5.0]

    with_keeper(models, check)


def test_a_version_that_is_loaded_again_runs_on_new_replicas(models: Path) -> None:
    async def check(asked: Asked) -> None:
        await asked.infer("other")
        first = asked.fleet.running("other", 1)
        assert await asked.change("other/load") == {"1": 1.0}
        second = asked.fleet.running("other", 1)
        assert second is not first
        turn = second.turn
        assert await asked.infer("other") == 5.0
        assert second.turn == turn + 1
        (counted,) = (await asked.ask("GET", "/v2/models/other/stats"))[1]["model_stats"]
        assert counted["inference_count"] == 2, "what replicas counted outlives them"
        while not first.ended:
            await asyncio.sleep(0.01)
        (counted,) = (await asked.ask("GET", "/v2/models/other/stats"))[1]["model_stats"]
        assert counted["inference_count"] == 2

    with_keeper(models, check)


def test_replaced_replicas_end_when_nothing_is_under_way_to_them(models: Path) -> None:
    async def check(asked: Asked) -> None:
        asked.add()
        assert [await asked.infer("scale", through) for through in (0, 1)] == [3.0, 3.0]
        old = asked.fleet.running("scale", 2)
        old.hold = asyncio.Event()
        held = asyncio.ensure_future(asked.infer("scale", 1))
        await asyncio.sleep(0)
        assert await asked.change("scale/load") == {"2": 1.0}
        assert [await asked.infer("scale", through) for through in (0, 1)] == [3.0, 3.0]
        await asyncio.sleep(0.2)
        assert not old.ended
        assert not held.done()
        old.hold.set()
        assert await held == 3.0
        while not old.ended:
            await asyncio.sleep(0.01)

    with_keeper(models, check)


def test_no_request_fails_through_rollbacks_and_each_is_answered_by_one_version(models: Path) -> None:
    async def check(asked: Asked) -> None:
        asked.add()
        over = False
        seen: set[float] = set()

        async def client(through: int) -> None:
            while not over:
                status, document = await asked.ask("POST", "/v2/models/scale/infer", request(1.0, 1.0), through)
                assert status == 200, document
                factor = {"1": 2.0, "2": 3.0}[document["model_version"]]
                assert document["outputs"][0]["data"][::4] == [factor] * 2, "all rows ran on one version"
                seen.add(factor)

        clients = [asyncio.ensure_future(client(number % 2)) for number in range(4)]
        for _ in range(5):
            assert await asked.change("scale/versions/1/promote") == {"1": 1.0}
            assert await asked.change("scale/rollback") == {"2": 1.0}
        over = True
        await asyncio.gather(*clients)
        assert seen == {2.0, 3.0}

    with_keeper(models, check, replace(ALL, policy=VersionPolicy()))


def test_a_version_that_cannot_be_deployed_leaves_the_old_one_serving(models: Path) -> None:
    async def check(asked: Asked) -> None:
        asked.fleet.broken.add(1)
        status, said = await asked.change("scale/versions/1/promote")
        assert (status, "on fire" in said) == (400, True)
        assert await asked.infer("scale") == 3.0
        asked.fleet.broken.clear()
        assert await asked.change("scale/versions/1/promote") == {"1": 1.0}
        assert await asked.infer("scale") == 2.0

    with_keeper(models, check, replace(ALL, policy=VersionPolicy()))


def test_changes_need_the_token(models: Path) -> None:
    async def check(asked: Asked) -> None:
        assert (await asked.ask("POST", "/v2/repository/models/scale/load"))[0] == 401
        wrong = {"authorization": "Bearer guess"}
        assert (await asked.ask("POST", "/v2/repository/models/scale/rollback", **wrong))[0] == 401
        load = triton.RepositoryModelLoadRequest(model_name="scale")
        assert (await asked.call("RepositoryModelLoad", load)).code == "UNAUTHENTICATED"
        assert (await asked.call("RepositoryModelLoad", load, tuple(TOKEN.items()))).code == ""
        unload = triton.RepositoryModelUnloadRequest(model_name="scale")
        assert (await asked.call("RepositoryModelUnload", unload, tuple(TOKEN.items()))).code == ""
        assert (await asked.infer("scale"))[0] == 404

    with_keeper(models, check)


def test_without_a_token_nothing_is_changed(models: Path) -> None:
    async def check(asked: Asked) -> None:
        assert (await asked.change("scale/load"))[0] == 403

    with_keeper(models, check, token=None)


def test_a_model_is_loaded_at_its_first_request_once(models: Path) -> None:
    async def check(asked: Asked) -> None:
        assert asked.fleet.remotes == []
        assert await asyncio.gather(*(asked.infer("scale") for _ in range(5))) == [3.0] * 5
        assert [remote.planned.version for remote in asked.fleet.remotes] == [2]
        asked.fleet.broken.add(1)
        status, said = await asked.infer("scale/versions/1")
        assert (status, "on fire" in said) == (503, True)

    with_keeper(models, check, replace(ALL, on_demand=True))


# counting -------------------------------------------------------------------------------------------------------------


def test_statistics_are_those_of_all_replicas(models: Path) -> None:
    async def check(asked: Asked) -> None:
        for _ in range(3):
            assert await asked.infer("scale/versions/1") == 2.0
        two = await asked.ask("POST", "/v2/models/scale/versions/1/infer", request(1.0, 2.0))
        assert two[0] == 200
        reports = await asked.fleet.running("scale", 1).reports()
        assert sorted(report.statistics.executions for report in reports) == [2, 2]
        (counted,) = (await asked.ask("GET", "/v2/models/scale/versions/1/stats"))[1]["model_stats"]
        assert (counted["inference_count"], counted["execution_count"]) == (5, 4)
        assert counted["inference_stats"]["success"]["count"] == 4
        assert [(batch["batch_size"], batch["compute_infer"]["count"]) for batch in counted["batch_stats"]] == [
            (1, 3),
            (2, 1),
        ]
        of_model = (await asked.ask("GET", "/v2/models/scale/stats"))[1]["model_stats"]
        assert [item["version"] for item in of_model] == ["1", "2"]
        of_all = (await asked.ask("GET", "/v2/models/stats"))[1]["model_stats"]
        assert [(item["name"], item["version"]) for item in of_all] == [("other", "1"), ("scale", "1"), ("scale", "2")]
        assert (await asked.ask("GET", "/v2/models/none/stats"))[0] == 404

    with_keeper(models, check, replace(ALL, workers=2))


def test_metrics_are_those_of_all_replicas(models: Path) -> None:
    async def check(asked: Asked) -> None:
        for _ in range(3):
            await asked.infer("scale/versions/1")
        metrics = ClusterMetrics(asked.keeper)
        body = (await metrics.handle(Request(b"GET", b"/metrics", {}, b""))).body
        lines = b"".join(body).decode().splitlines()
        one = '{model="scale",version="1"}'
        assert f"nv_inference_request_success{one} 3" in lines
        assert f"narrowcast_workers{one} 2" in lines
        assert f"nv_inference_pending_request_count{one} 0" in lines
        assert 'narrowcast_traffic_share{model="scale",version="2"} 1' in lines
        assert "narrowcast_ready 1" in lines
        assert not any("memory" in line for line in lines)
        gone = asked.fleet.running("scale", 1).replicas
        kept = gone.pop()
        lines = b"".join((await metrics.handle(Request(b"GET", b"/metrics", {}, b""))).body).decode().splitlines()
        assert f"narrowcast_workers{one} 1" in lines
        assert f"nv_inference_request_success{one} 3" in lines, "a counter never falls"
        gone.append(kept)
        with pytest.raises(Refusal, match="/metrics"):
            metrics.handle(Request(b"GET", b"/elsewhere", {}, b""))
        with pytest.raises(Refusal, match="only GET"):
            metrics.handle(Request(b"POST", b"/metrics", {}, b""))

    with_keeper(models, check, replace(ALL, workers=2))


def test_the_page_of_a_cluster_shows_the_numbers_of_all_replicas(models: Path) -> None:
    async def check(asked: Asked) -> None:
        for _ in range(3):
            await asked.infer("scale/versions/1")
        asked.fleet.running("scale", 2).replicas.pop()
        watch = ClusterMetrics(asked.keeper)
        document = json.loads(b"".join((await watch.handle(Request(b"GET", b"/status", {}, b""))).body))
        assert (document["state"], document["placement"]) == ("ready", "ray")
        assert (document["host"], document["memory"], document["gpus"]) == (None, None, [])
        assert document["now"] >= document["started"]
        found = {(m["name"], v["version"]): v["loaded"] for m in document["models"] for v in m["versions"]}
        assert {key: (item["workers"], item["workers_wanted"]) for key, item in found.items()} == {
            ("other", "1"): (2, 2),
            ("scale", "1"): (2, 2),
            ("scale", "2"): (1, 2),
        }
        one = found["scale", "1"]
        assert (one["pending"], one["running"], one["memory"], one["counted"]["succeeded"]) == (0, 0, None, 3)
        page = watch.handle(Request(b"GET", b"/", {}, b""))
        assert isinstance(page, Response)
        assert b"page.js" in b"".join(page.body)

    with_keeper(models, check, replace(ALL, workers=2))


@pytest.mark.slow
def test_a_browser_shows_a_cluster(models: Path, tmp_path: Path) -> None:
    async def check(asked: Asked) -> None:
        for _ in range(3):
            await asked.infer("scale")
        server = HttpServer(ClusterMetrics(asked.keeper).handle, Limits())
        port = await server.listen("127.0.0.1", 0)
        dom = await asyncio.to_thread(browse, tmp_path, f"http://127.0.0.1:{port}/", "--dump-dom")
        await server.close()
        said = words(dom)
        assert "models run in replicas on a Ray cluster" in said
        assert re.search(r"Version 2 ready 100 % 2 ", said)
        assert "Machine" not in said
        assert "does not answer" not in said

    (tmp_path / "seen").mkdir()
    with_keeper(models, check, replace(ALL, workers=2))


def counted(*requests: tuple[int, int]) -> Statistics:
    """Return statistics of batches, each of so many rows and nanoseconds."""
    result = Statistics()
    for rows, ns in requests:
        result.executed(rows, 1, (1, ns, 2), ns)
        result.succeeded(10, ns)
    return result


def test_statistics_are_added_by_batch_size() -> None:
    one, two = counted((1, 1_000_000), (4, 40)), counted((4, 80), (4, 80))
    two.reject("deadline")
    two.last = one.last + 5
    both = total([one, two])
    assert (both.inferences, both.executions, both.success.count) == (13, 4, 4)
    assert both.success.ns == 1_000_000 + 40 + 80 + 80
    assert both.last == two.last
    assert both.rejected == {"deadline": 1}
    assert {size: (times.count, times.infer_ns) for size, times in both.batches.items()} == {
        1: (1, 1_000_000),
        4: (3, 200),
    }
    assert both.batches[4].mean_ns == pytest.approx(200 / 3)
    assert both.buckets[0] == 4
    assert total([]) == Statistics()


def test_every_count_of_one_replica_is_kept() -> None:
    one = counted((1, 5), (4, 6))
    one.failed(7)
    one.reject("queue_full")
    one.expired, one.cancelled, one.overruns, one.padding = 1, 2, 3, 4
    assert total([one]) == one


def test_the_last_words_of_a_replica_stand() -> None:
    ledger, statistics = Ledger(), Statistics()
    ledger.note(Report("a", counted((1, 5))))
    ledger.note(Report("a", counted((1, 5), (1, 5))), ended=True)
    ledger.note(Report("a", counted((1, 5))))  # it was on its way before
    ledger.note(Report("b", counted((1, 5))))
    ledger.note(Report("c", counted((1, 5))), ended=True)
    ledger.write(statistics)
    assert statistics.executions == 4


# gRPC -----------------------------------------------------------------------------------------------------------------


def infer_message(model: str, version: str = "", values: int = 4, name: str = "seven") -> Any:
    message = triton.ModelInferRequest(model_name=model, model_version=version, id=name)
    message.inputs.add(name="x", datatype="FP32", shape=[1, 4])
    message.raw_input_contents.append(np.ones(values, np.float32).tobytes())
    return message


def test_calls_of_the_stubs_of_triton_are_answered_like_requests(models: Path) -> None:
    async def check(asked: Asked) -> None:
        answer = await asked.call("ModelInfer", infer_message("scale", "1"))
        response = triton.ModelInferResponse.FromString(answer.message)
        assert (response.model_version, response.id) == ("1", "seven")
        np.testing.assert_array_equal(np.frombuffer(response.raw_output_contents[0], np.float32), [2.0] * 4)
        bad = await asked.call("ModelInfer", infer_message("scale", values=3))
        assert (bad.message, bad.code) == (b"", "INVALID_ARGUMENT")
        assert (await asked.call("ModelInfer", infer_message("none"))).code == "NOT_FOUND"
        metadata = await asked.call("ModelMetadata", triton.ModelMetadataRequest(name="scale"))
        assert list(triton.ModelMetadataResponse.FromString(metadata.message).versions) == ["1", "2"]
        ready = await asked.call("ModelReady", triton.ModelReadyRequest(name="scale"))
        assert triton.ModelReadyResponse.FromString(ready.message).ready
        assert (await asked.call("ModelConfig", triton.ModelConfigRequest(name="none"))).code == "NOT_FOUND"
        counted = await asked.call("ModelStatistics", triton.ModelStatisticsRequest(name="scale", version="1"))
        (stats,) = triton.ModelStatisticsResponse.FromString(counted.message).model_stats
        assert stats.inference_stats.success.count == 1
        index = await asked.call("RepositoryIndex", triton.RepositoryIndexRequest())
        assert len(triton.RepositoryIndexResponse.FromString(index.message).models) == 3
        assert triton.ServerLiveResponse.FromString(
            (await asked.call("ServerLive", triton.ServerLiveRequest())).message
        ).live
        server = await asked.call("ServerReady", triton.ServerReadyRequest())
        assert triton.ServerReadyResponse.FromString(server.message).ready
        name = await asked.call("ServerMetadata", triton.ServerMetadataRequest())
        assert triton.ServerMetadataResponse.FromString(name.message).name == "narrowcast"
        for method in ("ModelInfer", "ModelConfig"):
            assert (await asked.ingresses[0].call(Call(method, b"\xff\xff"))).code == "INVALID_ARGUMENT"

    with_keeper(models, check)


def test_health_is_that_of_the_server_or_of_a_model(models: Path) -> None:
    async def check(asked: Asked) -> None:
        async def health(service: str) -> str:
            message = HEALTH["HealthCheckRequest"](service=service).SerializeToString()
            answer = await asked.ingresses[0].call(Call("Check", message))
            status = HEALTH["HealthCheckResponse"].FromString(answer.message).status
            return answer.code or {1: "SERVING", 2: "NOT_SERVING"}[status]

        await asked.ingresses[0].informed()
        services = ("", SERVICE, "scale", "other", "none")
        assert [await health(name) for name in services] == ["SERVING"] * 4 + ["NOT_FOUND"]
        asked.fleet.running("other", 1).replicas.clear()
        await asked.keeper.look()
        expected = ["NOT_SERVING", "NOT_SERVING", "SERVING", "NOT_SERVING", "NOT_FOUND"]
        assert [await health(name) for name in services] == expected
        assert (await asked.ingresses[0].call(Call("Check", b"\xff\xff"))).code == "INVALID_ARGUMENT"

    with_keeper(models, check)


def test_messages_larger_than_allowed_go_nowhere(models: Path) -> None:
    async def check(asked: Asked) -> None:
        message = infer_message("scale").SerializeToString()
        for largest, code in ((len(message), ""), (len(message) - 1, "RESOURCE_EXHAUSTED")):
            ingress = Ingress(asked.keeping, Limits(decompressed_bytes=largest))
            await ingress.informed()
            assert (await ingress.call(Call("ModelInfer", message))).code == code
            await ingress.stop()

    with_keeper(models, check)


def test_deadlines_of_calls_are_those_of_requests(models: Path) -> None:
    async def check(asked: Asked) -> None:
        message = infer_message("scale").SerializeToString()
        for remaining, code in ((None, ""), (60.0, ""), (0.0, "DEADLINE_EXCEEDED")):
            answer = await asked.ingresses[0].call(Call("ModelInfer", message, (), remaining))
            assert answer.code == code

    with_keeper(models, check)


def test_what_a_client_sends_is_not_taken_for_its_deadline() -> None:
    seen: list[Any] = []

    class Server:
        """As much of Ray's as the service is registered with."""

        def __init__(self) -> None:
            self.services: dict[str, Any] = {}

        def add_generic_rpc_handlers(self, handlers: Any) -> None:
            (added,) = handlers
            self.services[added.service_name()] = added
            replaced = added._method_handlers
            for name, handler in replaced.items():
                replaced[name] = handler._replace(unary_unary=answer, stream_stream=answer)

    async def answer(request: Any, context: Any) -> Any:
        seen.append((context.invocation_metadata(), context.peer()))
        return request

    server = Server()
    add_service(None, server)
    assert server.services.keys() == {SERVICE, "grpc.health.v1.Health"}
    handlers = server.services[SERVICE]
    method = handlers.service(SimpleNamespace(method=f"/{SERVICE}/ModelInfer"))
    for remaining in (None, 1.5):
        context = SimpleNamespace(
            invocation_metadata=lambda: (("application", "a"), ("narrowcast-remaining-seconds", "x")),
            time_remaining=lambda remaining=remaining: remaining,
            peer=lambda: "client",
        )
        assert asyncio.run(method.unary_unary(b"m", context)) == b"m"
    assert [split_deadline(metadata) for metadata, _ in seen] == [
        ((("application", "a"),), None),
        ((("application", "a"),), 1.5),
    ]
    assert [peer for _, peer in seen] == ["client", "client"]
    stream = handlers.service(SimpleNamespace(method=f"/{SERVICE}/ModelStreamInfer"))
    assert (stream.stream_stream, stream.request_streaming) == (answer, True)
    assert handlers.service(SimpleNamespace(method=f"/{SERVICE}/None")) is None


def test_streams_are_answered_in_order_and_go_on_after_an_error(models: Path) -> None:
    async def check(asked: Asked) -> None:
        async def messages() -> AsyncIterator[bytes]:
            for number in range(100):
                model = "none" if number == 7 else ("scale", "other")[number % 2]
                yield infer_message(model, name=str(number)).SerializeToString()
            yield b"\xff\xff"

        found = [
            triton.ModelStreamInferResponse.FromString(answer) async for answer in asked.ingresses[0].stream(messages())
        ]
        assert [answer.infer_response.id for answer in found] == [*map(str, range(100)), ""]
        failed = [number for number, answer in enumerate(found) if answer.error_message]
        assert failed == [7, 100]
        assert found[7].error_message == "model 'none' is not found: unknown"
        values = [
            np.frombuffer(found[number].infer_response.raw_output_contents[0], np.float32)[0] for number in (0, 1)
        ]
        assert values == [3.0, 5.0]

    with_keeper(models, check)

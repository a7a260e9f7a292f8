"""What the Ray engine does without Ray: the plan, the ingress, the replicas behind it, and statistics of several."""

from __future__ import annotations

import asyncio
import json
import pickle
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc.service_pb2 as triton
from serving_models import request, write_artifact

from narrowcast.artifacts.manifest import Manifest
from narrowcast.errors import ArtifactError, ConfigError
from narrowcast.recipes.target import Target
from narrowcast.serving.hosting import Hosting
from narrowcast.serving.http.message import Request, Response, refused
from narrowcast.serving.limits import Limits
from narrowcast.serving.ray.ingress import Ingress, RoutedModel
from narrowcast.serving.ray.merging import merged_statistics
from narrowcast.serving.ray.plan import PlannedModel, plan
from narrowcast.serving.ray.replica import ModelReplica
from narrowcast.serving.ray.wire import Call, CallAnswer, Remote
from narrowcast.serving.refusals import Refusal
from narrowcast.serving.repository import VersionPolicy
from narrowcast.serving.scheduling.queue import Batching
from narrowcast.serving.scheduling.scheduler import Settings
from narrowcast.serving.state import ModelState, write_state
from narrowcast.serving.workers.sources import Placement

ManifestOf = Callable[..., Manifest]
ALL = Hosting(settings=Settings(Batching(4)), policy=VersionPolicy(latest=0), workers=3)


@pytest.fixture
def models(tmp_path: Path, manifest_of: ManifestOf) -> Path:
    """Model ``scale``, whose version 1 doubles and version 2 triples, and model ``other``, which multiplies by 5."""
    for name, version, factor in (("scale", 1, 2.0), ("scale", 2, 3.0), ("other", 1, 5.0)):
        manifest = manifest_of(target=Target(threads=version))
        write_artifact(tmp_path / "models" / name / str(version) / "artifact", manifest, factor)
    return tmp_path / "models"


def planned(*places: Path, hosting: Hosting = ALL) -> tuple[PlannedModel, ...]:
    return plan(places, hosting, Limits(), 5.0)


class Copies(Remote):
    """Several replicas in this process, asked in turn; what goes to them and comes from them is pickled, as by Ray."""

    def __init__(self, replicas: list[ModelReplica]) -> None:
        self.replicas = replicas
        self.turn = 0

    def next(self) -> ModelReplica:
        if not self.replicas:
            raise Refusal(503, "no replica of the model can take the request", retry_after=1)
        self.turn += 1
        return self.replicas[self.turn % len(self.replicas)]

    async def ask(self, request: Request) -> Response:
        answer = await self.next().ask(pickle.loads(pickle.dumps(request)))
        return pickle.loads(pickle.dumps(answer))

    async def ask_all(self, request: Request) -> list[Response]:
        return [await replica.ask(request) for replica in self.replicas]

    async def call(self, call: Call) -> CallAnswer:
        return pickle.loads(pickle.dumps(await self.next().call(pickle.loads(pickle.dumps(call)))))


class Asked:
    """An ingress with its replicas."""

    def __init__(self, ingress: Ingress, remotes: dict[tuple[str, int], Copies]) -> None:
        self.ingress = ingress
        self.remotes = remotes

    async def ask(self, method: str, target: str, body: bytes = b"", **headers: str) -> tuple[int, Any]:
        named = {name.replace("_", "-").lower().encode(): value.encode() for name, value in headers.items()}
        try:
            outcome = self.ingress.handle(Request(method.encode(), target.encode(), named, body))
            response = outcome if isinstance(outcome, Response) else await outcome
        except Refusal as refusal:
            response = refused(refusal)
        joined = b"".join(response.body)
        return response.status, json.loads(joined) if joined.startswith((b"{", b"[")) else joined

    async def infer(self, target: str) -> Any:
        status, document = await self.ask("POST", f"/v2/models/{target}/infer", request(1.0))
        return document["outputs"][0]["data"][0] if status == 200 else (status, document["error"])

    async def call(self, method: str, message: Any) -> CallAnswer:
        return await self.ingress.call(Call(method, message.SerializeToString()))


def with_ingress(
    deployed: tuple[PlannedModel, ...], check: Callable[[Asked], Coroutine[Any, Any, None]], copies: int = 1
) -> None:
    """Run a check on an ingress before so many replicas of each version."""

    async def run() -> None:
        remotes: dict[tuple[str, int], Copies] = {}
        for model in deployed:
            for version in model.versions:
                started = [await ModelReplica.started(version) for _ in range(copies)]
                remotes[model.name, version.version] = Copies(started)
        draws = iter([0.05, 0.95, 0.5] * 10)
        routes = {
            model.name: RoutedModel(
                model.traffic, {version.version: remotes[model.name, version.version] for version in model.versions}
            )
            for model in deployed
        }
        try:
            await check(Asked(Ingress(routes, Limits(), lambda: next(draws)), remotes))
        finally:
            for remote in remotes.values():
                for replica in remote.replicas:
                    await replica.stop()

    asyncio.run(run())


# the plan -------------------------------------------------------------------------------------------------------------


def test_each_version_is_a_deployment_with_one_worker_in_a_thread(models: Path) -> None:
    other, scale = planned(models)
    assert [version.deployment for version in (*other.versions, *scale.versions)] == ["other-1", "scale-1", "scale-2"]
    assert scale.traffic.versions == (2,)
    version = scale.versions[1]
    assert (version.threads, version.fewest, version.ongoing) == (2, 3, 1024 + 4)
    assert version.hosting == replace(ALL, placement=Placement.THREAD, workers=1)
    assert pickle.loads(pickle.dumps(scale)) == scale


def test_promotions_and_files_of_options_are_kept_to(models: Path) -> None:
    write_state(models, "scale", ModelState(traffic={1: 1.0}))
    (models / "other" / "serving.json").write_text(json.dumps({"workers": 7}))
    other, scale = planned(models, hosting=replace(ALL, policy=VersionPolicy(latest=1)))
    assert scale.traffic.versions == (1,)
    assert [version.version for version in scale.versions] == [1, 2]
    assert other.versions[0].fewest == 7
    write_state(models, "scale", ModelState(traffic={1: 1.0, 9: 1.0}))
    assert planned(models)[1].traffic.versions == (2,)


def test_what_cannot_be_deployed_is_refused(models: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none of the versions"):
        planned(models, hosting=replace(ALL, policy=VersionPolicy(named=(5,))))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match="no model"):
        planned(tmp_path / "empty")
    graph = models / "other" / "1" / "artifact" / "model.onnx"
    graph.write_bytes(graph.read_bytes() + b"x")
    with pytest.raises(ArtifactError, match="damaged"):
        planned(models)


# the ingress ----------------------------------------------------------------------------------------------------------


def test_requests_go_to_their_model_and_version(models: Path) -> None:
    async def check(asked: Asked) -> None:
        assert await asked.infer("other") == 5.0
        assert await asked.infer("scale") == 3.0
        assert await asked.infer("scale/versions/1") == 2.0
        assert await asked.infer("sc%61le") == 3.0
        assert await asked.infer("scale/versions/9") == (404, "model 'scale' has no version '9' loaded; allowed: 1, 2")
        assert await asked.infer("scale/versions/x") == (404, "model 'scale' has no version 'x' loaded; allowed: 1, 2")
        assert (await asked.infer("none"))[0] == 404
        status, document = await asked.ask("GET", "/v2/models/scale/versions/1")
        assert (status, document["name"], document["versions"]) == (200, "scale", ["1", "2"])
        assert (await asked.ask("GET", "/v2/models/scale/config"))[1]["max_batch_size"] == 4
        assert (await asked.ask("POST", "/v2/models/other/infer", b"{"))[0] == 400
        assert (await asked.ask("GET", "/v2/models/other/infer"))[0] == 405
        assert (await asked.ask("GET", "/v2/models/other/ready"))[0] == 200

    with_ingress(planned(models), check)


def test_a_split_that_is_remembered_is_drawn_for_each_request(models: Path) -> None:
    write_state(models, "scale", ModelState(traffic={1: 1.0, 2: 9.0}))

    async def check(asked: Asked) -> None:
        assert [await asked.infer("scale") for _ in range(3)] == [2.0, 3.0, 3.0]

    with_ingress(planned(models), check)


def test_what_no_model_is_asked_is_answered_for_all(models: Path) -> None:
    async def check(asked: Asked) -> None:
        assert (await asked.ask("GET", "/v2"))[1]["name"] == "narrowcast"
        assert (await asked.ask("GET", "/v2/health/live"))[0] == 200
        assert (await asked.ask("GET", "/v2/health/ready"))[0] == 200
        assert (await asked.ask("GET", "/elsewhere"))[0] == 404
        assert (await asked.ask("DELETE", "/v2/health/ready"))[0] == 405
        assert (await asked.ask("POST", "/v2/repository/models/scale/load"))[0] == 403
        entries = (await asked.ask("POST", "/v2/repository/index"))[1]
        assert [(entry["name"], entry["version"], entry["state"]) for entry in entries] == [
            ("other", "1", "READY"),
            ("scale", "1", "READY"),
            ("scale", "2", "READY"),
        ]
        gone = asked.remotes["scale", 1].replicas
        kept, gone[:] = gone[:], []
        assert (await asked.ask("GET", "/v2/health/ready"))[0] == 503
        ready = (await asked.ask("POST", "/v2/repository/index", b'{"ready": true}'))[1]
        assert [entry["name"] + entry["version"] for entry in ready] == ["other1", "scale2"]
        assert (await asked.ask("POST", "/v2/repository/index", b"[]"))[0] == 400
        assert (await asked.infer("scale/versions/1"))[0] == 503
        assert await asked.infer("scale") == 3.0
        gone[:] = kept

    with_ingress(planned(models), check)


def test_statistics_are_those_of_all_replicas(models: Path) -> None:
    async def check(asked: Asked) -> None:
        for _ in range(3):
            assert await asked.infer("scale/versions/1") == 2.0
        two = await asked.ask("POST", "/v2/models/scale/versions/1/infer", request(1.0, 2.0))
        assert two[0] == 200
        counts = [
            json.loads(b"".join(answer.body))["model_stats"][0]["execution_count"]
            for answer in await asked.remotes["scale", 1].ask_all(Request(b"GET", b"/v2/models/scale/stats", {}, b""))
        ]
        assert sorted(counts) == [2, 2]
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

    with_ingress(planned(models), check, copies=2)


def test_statistics_are_added_by_name_and_batch_size() -> None:
    def counted(last: int, sizes: dict[int, int]) -> dict[str, Any]:
        batches = [{"batch_size": size, "compute_infer": {"count": n, "ns": 10 * n}} for size, n in sizes.items()]
        return {"name": "net", "version": "3", "last_inference": last, "execution_count": 2, "batch_stats": batches}

    merged = merged_statistics([counted(5, {1: 1, 4: 1}), counted(9, {2: 2}), counted(7, {4: 2})])
    assert merged == {
        "name": "net",
        "version": "3",
        "last_inference": 9,
        "execution_count": 6,
        "batch_stats": [
            {"batch_size": size, "compute_infer": {"count": n, "ns": 10 * n}} for size, n in ((1, 1), (2, 2), (4, 3))
        ],
    }


# gRPC -----------------------------------------------------------------------------------------------------------------


def infer_message(model: str, version: str = "", values: int = 4) -> Any:
    message = triton.ModelInferRequest(model_name=model, model_version=version, id="seven")
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
        load = await asked.call("RepositoryModelLoad", triton.RepositoryModelLoadRequest(model_name="scale"))
        assert load.code == "UNIMPLEMENTED"
        broken = await asked.ingress.call(Call("ModelInfer", b"\xff\xff"))
        assert broken.code == "INVALID_ARGUMENT"

    with_ingress(planned(models), check)

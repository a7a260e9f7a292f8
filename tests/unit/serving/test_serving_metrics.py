"""What Prometheus reads: names, types and labels that dashboards were made for, and numbers that hold."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from serving_models import doubled, function, request

from narrowcast.errors import DataError
from narrowcast.serving.catalogue import Hosting
from narrowcast.serving.loader import MemoryUse
from narrowcast.serving.scheduling.queue import Batching
from narrowcast.serving.scheduling.scheduler import Settings
from narrowcast.serving.watching import metrics
from narrowcast.serving.watching.exposition import Family, Sample, exposition
from narrowcast.serving.watching.gpus import Gpu, Gpus, main
from narrowcast.serving.watching.host import HostMeter
from narrowcast.serving.workers.sources import Placement

#: Names, types and labels of Triton's metrics as its documentation lists them (docs/user_guide/metrics.md).
TRITON = {
    "nv_inference_request_success": ("counter", {"model", "version"}),
    "nv_inference_request_failure": ("counter", {"model", "version", "reason"}),
    "nv_inference_count": ("counter", {"model", "version"}),
    "nv_inference_exec_count": ("counter", {"model", "version"}),
    "nv_inference_request_duration_us": ("counter", {"model", "version"}),
    "nv_inference_queue_duration_us": ("counter", {"model", "version"}),
    "nv_inference_compute_input_duration_us": ("counter", {"model", "version"}),
    "nv_inference_compute_infer_duration_us": ("counter", {"model", "version"}),
    "nv_inference_compute_output_duration_us": ("counter", {"model", "version"}),
    "nv_inference_pending_request_count": ("gauge", {"model", "version"}),
    "nv_cpu_utilization": ("gauge", set[str]()),
    "nv_cpu_memory_total_bytes": ("gauge", set[str]()),
    "nv_cpu_memory_used_bytes": ("gauge", set[str]()),
}
TRITON_GPU = {
    "nv_gpu_utilization": "gauge",
    "nv_gpu_memory_total_bytes": "gauge",
    "nv_gpu_memory_used_bytes": "gauge",
    "nv_gpu_power_usage": "gauge",
    "nv_gpu_power_limit": "gauge",
    "nv_energy_consumption": "counter",
}


def parsed(text: str) -> dict[str, Metric]:
    """Return families by name; each name comes once."""
    families = list(text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families)
    return {family.name: family for family in families}


def value(family: Metric, suffix: str = "", **labels: str) -> float:
    """Return the sample of these labels; the parser calls those of counters ``_total``, whatever they were called."""
    name = family.name + ("_total" if family.type == "counter" else suffix)
    (found,) = [
        sample.value for sample in family.samples if sample.name == name and labels.items() <= sample.labels.items()
    ]
    return found


def poisoned(inputs: Any) -> Any:
    if inputs["x"][:, 0].max() > 1e6:
        raise DataError("too much")
    return doubled(inputs)


@pytest.fixture(scope="module")
def families(serve_once: Any) -> dict[str, Metric]:
    """Of a server that has run three requests of six rows and failed one, and of a model that nobody has asked."""
    hosting = Hosting(Placement.INLINE, 1, Settings(Batching(8)))
    running = serve_once({"scale": function(poisoned), "idle": function()}, hosting=hosting, metrics_port=0)
    for rows in (1, 2, 3):
        assert running.infer("scale", request(*range(rows))).status == 200
    assert running.infer("scale", request(1e9)).status == 400
    running.server.catalogue.find("scale").scheduler.statistics.reject("queue_full")
    answer = running.ask("GET", "/metrics", port="metrics")
    assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    lines = answer.body.decode().splitlines()
    assert {line.split("{")[0].split(" ")[0] for line in lines} > TRITON.keys()
    return parsed(answer.body.decode())


@pytest.mark.parametrize("name", TRITON)
def test_what_dashboards_expect_is_there(families: dict[str, Metric], name: str) -> None:
    kind, labels = TRITON[name]
    family = families[name]
    assert family.type == kind
    assert family.documentation
    assert family.samples
    assert {frozenset(sample.labels) for sample in family.samples} == {frozenset(labels)}
    if "model" in labels:
        assert {sample.labels["model"] for sample in family.samples} == {"scale", "idle"}


def test_numbers_are_those_of_the_requests(families: dict[str, Metric]) -> None:
    def of(name: str, model: str = "scale", **labels: str) -> float:
        return value(families[name], model=model, version="1", **labels)

    assert of("nv_inference_request_success") == 3
    assert of("nv_inference_request_success", "idle") == 0
    assert of("nv_inference_count") == 6
    assert of("nv_inference_exec_count") == 3
    failures = {reason: of("nv_inference_request_failure", reason=reason) for reason in ("REJECTED", "BACKEND")}
    assert failures == {"REJECTED": 1, "BACKEND": 1}
    assert of("nv_inference_request_failure", reason="CANCELED") == 0
    assert 0 < of("nv_inference_compute_infer_duration_us") <= of("nv_inference_request_duration_us")
    refused = value(families["narrowcast_requests_refused"], model="scale", reason="queue_full")
    assert refused == 1
    causes = {
        s.labels["reason"] for s in families["narrowcast_requests_refused"].samples if s.labels["model"] == "idle"
    }
    assert causes == {"queue_full", "deadline", "unavailable", "expired"}, "known before the first"
    assert of("narrowcast_workers") == of("narrowcast_workers_wanted") == 1
    assert of("narrowcast_model_memory_bytes") >= 0
    assert value(families["narrowcast_padding_rows"], model="scale") == 0
    assert value(families["narrowcast_batch_overruns"], model="scale") == 0
    assert value(families["narrowcast_model_loads"]) == 2
    assert value(families["narrowcast_model_evictions"]) == 0
    assert value(families["narrowcast_memory_used_bytes"]) >= 0
    assert "narrowcast_memory_budget_bytes" not in families, "there is none"
    assert of("narrowcast_traffic_share") == 1
    assert value(families["narrowcast_ready"]) == 1


def test_histograms_add_up(families: dict[str, Metric]) -> None:
    rows, seconds = families["narrowcast_batch_rows"], families["narrowcast_request_duration_seconds"]
    assert (rows.type, seconds.type) == ("histogram", "histogram")
    counts = {sample.labels["le"]: sample.value for sample in rows.samples if sample.labels.get("le")}
    found = {
        sample.labels["le"]: sample.value
        for sample in rows.samples
        if sample.labels["model"] == "scale" and "le" in sample.labels
    }
    assert counts.keys() == found.keys()
    assert [found[end] for end in ("1", "2", "4", "1024", "+Inf")] == [1, 2, 3, 3, 3]
    assert value(rows, "_sum", model="scale") == 6
    assert value(rows, "_count", model="scale") == 3
    assert value(seconds, "_count", model="scale") == value(seconds, "_bucket", model="scale", le="+Inf") == 3
    assert 0 < value(seconds, "_sum", model="scale") < 60


def test_the_machine_is_this_one(families: dict[str, Metric]) -> None:
    memory = psutil.virtual_memory()
    assert value(families["nv_cpu_memory_total_bytes"]) == memory.total
    assert 0 < value(families["nv_cpu_memory_used_bytes"]) <= memory.total
    assert 0 <= value(families["nv_cpu_utilization"]) <= 1
    assert value(families["process_cpu_seconds"]) > 0
    assert value(families["process_open_fds"]) > 3
    assert abs(value(families["process_start_time_seconds"]) - psutil.Process().create_time()) < 1


def test_the_memory_of_models_has_a_budget_where_there_is_one() -> None:
    found = parsed(exposition(metrics.memory_families(MemoryUse(used=3, budget=7, loads=5, evictions=2))))
    assert {name: value(family) for name, family in found.items()} == {
        "narrowcast_memory_used_bytes": 3,
        "narrowcast_memory_budget_bytes": 7,
        "narrowcast_model_loads": 5,
        "narrowcast_model_evictions": 2,
    }


def test_utilisation_is_that_between_two_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    now, times = [0.0], {"user": 1.0, "system": 1.0, "idle": 8.0, "iowait": 0.0, "guest": 1.0}
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr(psutil, "cpu_times", lambda: SimpleNamespace(_asdict=lambda: dict(times)))
    meter = HostMeter()
    now[0] = 5.0
    times |= {"user": 4.0, "idle": 17.0, "iowait": 1.0, "guest": 3.0}
    assert meter.read().utilization == pytest.approx(3 / 13)
    now[0] = 5.5
    times["user"] = 9.0
    assert meter.read().utilization == pytest.approx(3 / 13), "a moment later the same is said"
    now[0] = 6.5
    assert meter.read().utilization == pytest.approx(1.0)


def test_names_are_escaped() -> None:
    odd = 'a"b\\c\nd'
    text = exposition([Family("net", "gauge", "A number", [Sample({"model": odd}, 0.1 + 0.2), Sample({}, 3e21)])])
    (family,) = parsed(text).values()
    assert [(sample.labels, sample.value) for sample in family.samples] == [({"model": odd}, 0.1 + 0.2), ({}, 3e21)]


@pytest.mark.parametrize(
    ("method", "target", "status"), [("GET", "/other", 404), ("POST", "/metrics", 405), ("HEAD", "/metrics", 200)]
)
def test_nothing_else_is_answered(serve: Any, method: str, target: str, status: int) -> None:
    running = serve({"scale": function()}, metrics_port=0)
    assert running.ask(method, target, port="metrics").status == status


# GPUs -----------------------------------------------------------------------------------------------------------------


class NotSupportedError(Exception):
    pass


class PlantedNvml:
    """NVML of a machine with two GPUs; the second says nothing but its name and memory, as a part of a GPU does."""

    NVMLError = NotSupportedError

    def __init__(self) -> None:
        self.open = 0
        self.energy = 5_000_000

    def nvmlInit(self) -> None:  # noqa: N802
        self.open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Any:  # noqa: N802
        return index

    def nvmlDeviceGetUUID(self, handle: Any) -> str:  # noqa: N802
        return f"GPU-{handle}"

    def nvmlDeviceGetName(self, handle: Any) -> str:  # noqa: N802
        return "NVIDIA T1000"

    def nvmlDeviceGetMemoryInfo(self, handle: Any) -> Any:  # noqa: N802
        return SimpleNamespace(total=4 << 30, used=1 << 30, free=3 << 30)

    def _first(self, handle: Any, answer: Any) -> Any:
        if handle:
            raise NotSupportedError
        return answer

    def nvmlDeviceGetUtilizationRates(self, handle: Any) -> Any:  # noqa: N802
        return self._first(handle, SimpleNamespace(gpu=25, memory=10))

    def nvmlDeviceGetPowerUsage(self, handle: Any) -> int:  # noqa: N802
        return self._first(handle, 31_500)

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: Any) -> int:  # noqa: N802
        return self._first(handle, 50_000)

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Any) -> int:  # noqa: N802
        return self._first(handle, self.energy)


FIRST = Gpu("GPU-0", "NVIDIA T1000", 0.25, 4 << 30, 1 << 30, 31.5, 50.0, 2.25)
SECOND = Gpu("GPU-1", "NVIDIA T1000", None, 4 << 30, 1 << 30)


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Iterator[PlantedNvml]:
    planted = PlantedNvml()
    monkeypatch.setitem(sys.modules, "pynvml", planted)
    yield planted
    assert planted.open == 0


def test_gpus_are_read(nvml: PlantedNvml) -> None:
    gpus = Gpus(nvml)
    nvml.energy += 2250
    assert gpus.read() == [FIRST, SECOND]
    gpus.close()


def test_gpus_are_among_the_metrics(nvml: PlantedNvml, serve: Any) -> None:
    running = serve({"scale": function()}, metrics_port=0)
    nvml.energy += 2250
    found = parsed(running.ask("GET", "/metrics", port="metrics").body.decode())
    for name, kind in TRITON_GPU.items():
        assert found[name].type == kind
        assert {frozenset(sample.labels) for sample in found[name].samples} == {frozenset(["gpu_uuid"])}
    assert value(found["nv_gpu_utilization"], gpu_uuid="GPU-0") == 0.25
    assert value(found["nv_gpu_memory_used_bytes"], gpu_uuid="GPU-1") == 1 << 30
    assert value(found["nv_energy_consumption"], gpu_uuid="GPU-0") == 2.25
    assert [sample.labels for sample in found["nv_gpu_power_usage"].samples] == [{"gpu_uuid": "GPU-0"}]
    running.stop()


@pytest.mark.parametrize("missing", ["package", "driver", "device"])
def test_without_gpus_there_are_no_lines(missing: str, serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    planted = PlantedNvml()
    if missing == "driver":
        monkeypatch.setattr(planted, "nvmlInit", lambda: planted._first(1, None))
    if missing == "device":
        monkeypatch.setattr(planted, "nvmlDeviceGetCount", lambda: 0)
    monkeypatch.setitem(sys.modules, "pynvml", None if missing == "package" else planted)
    running = serve({"scale": function()}, metrics_port=0)
    answer = running.ask("GET", "/metrics", port="metrics")
    assert answer.status == 200
    assert not TRITON_GPU.keys() & parsed(answer.body.decode()).keys()
    assert planted.open == 0


def test_a_gpu_that_has_gone_is_left_out(nvml: PlantedNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = Gpus(nvml)
    monkeypatch.setattr(nvml, "nvmlDeviceGetUUID", lambda handle: nvml._first(handle, "GPU-0"))
    assert [gpu.uuid for gpu in gpus.read()] == ["GPU-0"]
    gpus.close()
    assert not any(family.samples for family in metrics.gpu_families([]))


@pytest.mark.gpu
def test_a_real_gpu_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    gpus = Gpus.find()
    assert gpus is not None, "there is a GPU, but NVML does not show it"
    (before, *_) = gpus.read()
    held = torch.randn(8192, 8192, device="cuda")
    for _ in range(200):
        held = held @ held / 8192
    torch.cuda.synchronize()
    (after, *_) = gpus.read()
    assert after.uuid == before.uuid
    assert after.uuid.startswith(("GPU-", "MIG-"))
    assert after.memory_total is not None
    assert after.memory_used is not None
    assert held.nbytes < after.memory_used <= after.memory_total
    if after.energy is not None and before.energy is not None:
        assert after.energy > before.energy >= 0
    if after.power is not None and after.power_limit is not None:
        assert 0 < after.power < 2 * after.power_limit
    gpus.close()
    assert main() == 0
    assert after.uuid in capsys.readouterr().out


def test_the_command_says_what_it_finds(nvml: PlantedNvml, capsys: pytest.CaptureFixture[str]) -> None:
    assert main() == 0
    assert '"uuid": "GPU-0"' in capsys.readouterr().out
    nvml.open = 0  # the program ends with it

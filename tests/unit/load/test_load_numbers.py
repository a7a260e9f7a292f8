"""Numbers from planted records, recovery, and energy."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from load_results import CLIENT, records, run

from narrowcast.load.stress import recovered_after
from narrowcast.measure.load.energy import open_meter
from narrowcast.measure.load.records import Outcome, Records, as_jsonl, empty_records, outcome_of
from narrowcast.measure.load.summary import Span, missed, query_latencies, window
from narrowcast.measure.load.values import Slo


def test_rates_latencies_and_outcomes_are_those_that_were_planted() -> None:
    found = run(records(), Slo(percentile=99, seconds=0.015))
    assert found.offered == 400
    assert (found.counts.due, found.counts.ok, found.counts.shed) == (3600, 3564, 36)
    assert found.statuses == {"200": 3564, "503": 36}
    assert found.rate is not None
    assert found.rate.value == pytest.approx(396, rel=0.01)
    assert found.rows_rate == pytest.approx(2 * 396, rel=0.01)
    assert found.within is not None
    assert found.within.value == pytest.approx(0.99 / 2, abs=0.03)
    assert found.goodput is not None
    assert found.goodput.value == pytest.approx(198, rel=0.06)
    median = next(one.estimate for one in found.percentiles if one.q == 50)
    assert median is not None
    assert median.low <= 0.015 <= median.high
    assert found.percentiles[-1].estimate is None  # 3,564 answers say nothing of p99.9
    assert found.mean is not None
    assert found.mean.value == pytest.approx(0.015, rel=0.02)
    assert [one.kind for one in found.findings] == ["failures"]
    assert sum(one.offered for one in found.bins) / len(found.bins) == pytest.approx(400, rel=0.02)


def test_lateness_counts_in_latency_and_voids_the_run() -> None:
    found = run(records(late=0.006))
    assert found.mean is not None
    assert found.mean.value == pytest.approx(0.021, rel=0.02)
    assert found.void
    assert "other programs kept the processor" in found.findings[0].words
    assert not run(records(late=0.004)).void
    assert not run(records(late=0.006), concurrency=4).void  # nothing is due in a closed loop


def test_a_saturated_client_is_said() -> None:
    busy = CLIENT.model_copy(update={"cpu_share": 0.97})
    assert "used 97% of a core" in run(records(), client=busy).findings[0].words
    assert "at least what was measured" in run(records(), client=busy, concurrency=4).findings[0].words


def test_a_trend_and_a_server_that_falls_behind_are_said() -> None:
    made = records()
    made["done"] += made["intended"] * 0.3
    kinds = {one.kind for one in run(made).findings}
    assert {"drift", "behind"} <= kinds


def test_a_query_lasts_until_its_last_answer() -> None:
    made = records()
    made["query"] = np.arange(len(made)) // 4
    made["intended"] = np.repeat(made["intended"][::4], 4)
    made["outcome"] = Outcome.OK
    found = run(made, concurrency=4)
    slowest = (made["done"] - made["intended"]).reshape(-1, 4).max(axis=1)
    assert found.mean is not None
    assert found.mean.value == pytest.approx(slowest[100:].mean(), rel=0.01)


def test_a_query_is_good_only_if_all_its_answers_are() -> None:
    made = records()
    made["query"] = np.arange(len(made)) // 4
    made["intended"] = np.repeat(made["intended"][::4], 4)
    made["done"] = made["intended"] + 0.01
    made["outcome"] = Outcome.OK
    made["outcome"][::8] = Outcome.SHED  # one of four in every second query
    found = run(made, Slo(percentile=99, seconds=0.015), concurrency=4)
    assert found.within is not None
    assert found.within.value == 0.5
    assert found.goodput is not None
    assert found.goodput.value == pytest.approx(200, rel=0.02)
    assert found.mean is not None
    assert found.mean.samples == 450


def test_latencies_are_in_the_order_of_time_whichever_process_sent_what() -> None:
    made = records()
    made["outcome"] = Outcome.OK
    alone = run(made)
    made["query"] = np.arange(len(made)) // 2 + np.arange(len(made)) % 2 * len(made)  # as two processes number them
    assert query_latencies(made) == pytest.approx(made["done"] - made["intended"])
    assert run(made) == alone


def test_requests_past_the_bound_when_they_were_cut_off_have_missed_it() -> None:
    made = records()
    made["intended"] = np.arange(len(made)) / 400.0
    cut = made["intended"] >= 9.0
    made["outcome"][cut], made["done"][cut] = Outcome.CUT, np.nan
    counted = window(made, Span(1.0, 10.0, 0.005, bound=0.5))
    assert (counted["outcome"] == Outcome.CUT).sum() == 200  # of 400, those due more than half a second before the end
    assert missed(counted, 0.5)[-200:].all()
    assert not (window(made, Span(1.0, 10.0, 0.005))["outcome"] == Outcome.CUT).any()


def test_requests_that_were_never_sent_are_late_until_they_were_given_up() -> None:
    made = records()
    made["sent"][::10], made["outcome"][::10] = np.nan, Outcome.TIMEOUT
    made["done"][::10] = made["intended"][::10] + 5.0
    found = run(made)
    assert found.lateness.p99 == pytest.approx(5.0)
    assert found.void


def test_statuses_mean_what_the_protocols_say() -> None:
    assert [outcome_of(status) for status in (200, 429, 503, 504, 500, 400)] == [
        Outcome.OK,
        Outcome.SHED,
        Outcome.SHED,
        Outcome.TIMEOUT,
        Outcome.ERROR,
        Outcome.ERROR,
    ]
    assert [outcome_of(code, grpc=True) for code in (0, 8, 14, 4, 3)] == [
        Outcome.OK,
        Outcome.SHED,
        Outcome.SHED,
        Outcome.TIMEOUT,
        Outcome.ERROR,
    ]


def overloaded(*, backlog: float, failing: float = 0.0) -> Records:
    """Return 100 requests a second for 30 s; those of seconds 10 to 15 shed, and latency high for ``backlog`` s after them."""
    made = records(3000, rate=100.0)
    made["outcome"] = Outcome.OK
    due = made["intended"]
    slow = (due >= 10) & (due < 15 + backlog)
    made["done"][slow] += 1.0
    shed = ((due >= 10) & (due < 15)) | ((due >= 15 + backlog) & (np.arange(3000) % 100 < failing * 100))
    made["outcome"][shed] = Outcome.SHED
    return made


@pytest.mark.parametrize("backlog", [0.0, 2.0, 7.0])
def test_recovery_is_when_requests_fare_as_before(backlog: float) -> None:
    found = recovered_after(overloaded(backlog=backlog), 1.0, 10.0, 15.0)
    assert found is not None
    assert backlog <= found + 1e-9 <= backlog + 0.5  # to a stretch of 20 requests


def test_a_server_that_goes_on_failing_has_not_recovered() -> None:
    assert recovered_after(overloaded(backlog=1.0, failing=0.3), 1.0, 10.0, 15.0) is None
    assert recovered_after(overloaded(backlog=15.0), 1.0, 10.0, 15.0) is None


def test_what_is_not_known_is_null() -> None:
    line = json.loads(as_jsonl(empty_records(1)))
    assert line["sent"] is None
    assert line["outcome"] == "cut"


def counter(folder: Path, microjoules: int, name: str = "package-0") -> Path:
    zone = folder / "intel-rapl:0"
    zone.mkdir(parents=True, exist_ok=True)
    (zone / "name").write_text(f"{name}\n")
    (zone / "max_energy_range_uj").write_text("10000000\n")
    (zone / "energy_uj").write_text(f"{microjoules}\n")
    return zone / "energy_uj"


def test_energy_is_read_from_counters_that_begin_again(tmp_path: Path) -> None:
    file = counter(tmp_path, 9_000_000)
    (tmp_path / "intel-rapl:0:0").mkdir()  # a part of the package, which is counted in it
    meter = open_meter(local=True, powercap=tmp_path)
    meter.start()
    file.write_text("2000000\n")
    found = meter.spent(100)
    assert found.joules["package-0"] == pytest.approx(3.0)
    assert found.unavailable == ""
    assert meter.spent(0).per_request is None


class Nvml:
    """As much of NVML as is asked: two GPUs that have spent some energy."""

    NVMLError = RuntimeError

    def __init__(self, *, works: bool = True) -> None:
        self.spent = [1000, 5000]
        self.works = works

    def nvmlInit(self) -> None:  # noqa: N802
        if not self.works:
            raise RuntimeError("no driver")

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.spent)

    def nvmlDeviceGetHandleByIndex(self, place: int) -> int:  # noqa: N802
        return place

    def nvmlDeviceGetTotalEnergyConsumption(self, place: int) -> int:  # noqa: N802
        return self.spent[place]


def test_energy_of_gpus_is_read_in_millijoules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    meter = open_meter(local=True, powercap=tmp_path)
    meter.start()
    nvml.spent = [3000, 9000]
    found = meter.spent(3)
    assert found.joules == {"gpu-0": 2.0, "gpu-1": 4.0}
    assert found.per_request == 2.0
    monkeypatch.setitem(sys.modules, "pynvml", Nvml(works=False))
    found = open_meter(local=True, powercap=tmp_path).spent(3)
    assert (found.per_request, found.unavailable) == (None, "unavailable: this machine has no energy counter")


def test_energy_without_a_counter_is_unavailable(tmp_path: Path) -> None:
    assert open_meter(local=False).spent(5).unavailable == "unavailable: the server is on another machine"

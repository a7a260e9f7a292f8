"""Measuring a machine: probes that count what they run, rates that are found again, a device that can be saved."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from narrowcast.accounting.classes import OperatorClass
from narrowcast.accounting.counting import Work
from narrowcast.accounting.devices import device, save_device
from narrowcast.accounting.efficiencies import Rates
from narrowcast.accounting.kinds import Kind
from narrowcast.accounting.operators import Operator
from narrowcast.accounting.policies import policy
from narrowcast.accounting.roofline import estimate
from narrowcast.accounting.trace import trace
from narrowcast.errors import RuntimeMissingError
from narrowcast.measure.machine import CudaNumbers, cpu_device, cuda_device, measure_cuda
from narrowcast.measure.probes import (
    Case,
    Sample,
    attention_case,
    batched_case,
    convolution_case,
    product_case,
    stream_case,
)
from narrowcast.measure.probes_onnx import blocks, node_seconds, run_block
from narrowcast.measure.probes_torch import dispatch_seconds, gpu_cases, product_peak, run_case
from narrowcast.measure.rates import fit, fit_class, load_of, residuals

PEAK, BANDWIDTH, CACHE = 1e12, 1e11, 2**22


@pytest.fixture(autouse=True)
def _no_catalogue_of_ones_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))


def taken(case: Case, rates: Rates, noise: float = 1.0) -> Sample:
    """A sample that took what the rates say."""
    seconds = rates.seconds(load_of(Sample(case, 4, 1.0, 1.0, 1.0), CACHE), PEAK, BANDWIDTH) * noise
    return Sample(case, 4, seconds, seconds, seconds)


PRODUCTS = [
    product_case(rows, inputs, outputs)
    for rows in (1, 8, 64, 512)
    for inputs, outputs in ((64, 64), (64, 1024), (1024, 64), (1024, 1024), (4096, 4096))
]


def test_rates_are_found_again_from_the_times_that_they_make() -> None:
    rng = np.random.default_rng(0)
    truth = Rates(compute=0.6, rows_half=5, depth_half=20, weights=0.5, cached=3, fixed_us=2)
    samples = [taken(case, truth, math.exp(rng.normal(0, 0.02))) for case in PRODUCTS]
    found = fit_class(samples, peak=PEAK, bandwidth=BANDWIDTH, cache=CACHE)
    misses = residuals(samples, found, peak=PEAK, bandwidth=BANDWIDTH, cache=CACHE)
    assert np.median(np.abs(misses)) < 0.03
    assert found.compute == pytest.approx(0.6, rel=0.15)
    assert found.rows_half == pytest.approx(5, rel=0.25)
    assert found.weights == pytest.approx(0.5, rel=0.1)


def test_one_odd_probe_does_not_decide() -> None:
    truth = Rates(cached=2, fixed_us=1)
    cases = [stream_case(OperatorClass.ELEMENTWISE, "add", 1 << power, passes=3) for power in range(10, 18)]
    samples = [taken(case, truth, 20.0 if place == 3 else 1.0) for place, case in enumerate(cases)]
    found = fit(samples, peak=PEAK, bandwidth=BANDWIDTH, cache=CACHE)[OperatorClass.ELEMENTWISE]
    good = [sample for place, sample in enumerate(samples) if place != 3]
    assert np.max(np.abs(residuals(good, found, peak=PEAK, bandwidth=BANDWIDTH, cache=CACHE))) < 0.25


@pytest.mark.parametrize(
    ("case", "module", "inputs"),
    [
        (product_case(5, 8, 16), torch.nn.Linear(8, 16, bias=False), (5, 8)),
        (convolution_case(2, 8, 16, 14, 3), torch.nn.Conv2d(8, 16, 3, padding=1, bias=False), (2, 8, 14, 14)),
        (convolution_case(2, 8, 16, 14, 3, stride=2), torch.nn.Conv2d(8, 16, 3, 2, 1, bias=False), (2, 8, 14, 14)),
        (convolution_case(1, 8, 8, 14, 3, groups=8), torch.nn.Conv2d(8, 8, 3, 1, 1, 1, 8, False), (1, 8, 14, 14)),
    ],
)
def test_a_case_counts_what_its_operator_counts(case: Case, module: torch.nn.Module, inputs: tuple[int, ...]) -> None:
    run = trace(module, (torch.randn(inputs),))
    operator = next(one for one in run.operators if one.work and one.work.macs)
    assert case.macs == operator.work.macs  # type: ignore[union-attr]
    assert case.weights * 4 == operator.weight_bytes
    assert case.moved * 4 == operator.bytes_read - operator.weight_bytes + operator.bytes_written


def test_products_of_activations_and_attention_count_both_sides() -> None:
    assert batched_case(3, 4, 5, 6).macs == 3 * 4 * 5 * 6
    assert attention_case(2, 3, 10, 16).macs == 2 * (2 * 3 * 10 * 10 * 16)


# Probes ---------------------------------------------------------------------------------------------------------------


PROBED = (
    "bottleneck 64 groups 32",
    "bottleneck 256 groups 1",
    "inverted 96",
    "stem 3x3",
    "dense layer 512",
    "transformer 32 x 256",
    "LSTM 384",
)


@pytest.fixture(scope="module")
def probed() -> dict[str, list[Sample]]:
    return {block.name: run_block(block, threads=1, runs=2) for block in blocks() if block.name in PROBED}


def test_the_blocks_hold_every_class_that_onnx_runtime_has_kernels_of(probed: dict[str, list[Sample]]) -> None:
    assert set(probed) == set(PROBED)
    samples = [sample for found in probed.values() for sample in found]
    kinds = {sample.case.kind for sample in samples}
    assert set(OperatorClass) - kinds == {OperatorClass.BATCHED, OperatorClass.SOFTMAX}  # inside attention
    assert all(sample.seconds > 0 for sample in samples if sample.case.macs > 1e6)


def test_the_samples_of_a_block_count_its_macs(probed: dict[str, list[Sample]]) -> None:
    def macs(name: str, kind: OperatorClass | None = None) -> float:
        return sum(sample.case.macs for sample in probed[name] if kind in (None, sample.case.kind))

    assert macs("bottleneck 256 groups 1") == 14 * 14 * (1024 * 256 + 256 * 256 * 9 + 256 * 1024 + 1024 * 256)
    assert macs("bottleneck 64 groups 32", OperatorClass.GROUPED) == 56 * 56 * 64 * 2 * 9
    assert macs("transformer 32 x 256", OperatorClass.ATTENTION) == 2 * 32 * 32 * 256
    assert macs("transformer 32 x 256", OperatorClass.PRODUCT) == 32 * 256 * 256 * 12
    assert macs("LSTM 384") == 48 * 4 * 384 * (192 + 384)


def test_small_torch_probes_run_on_the_cpu() -> None:
    small = {case.name: case for case in gpu_cases() if case.moved < 1 << 18 and case.macs < 1 << 23}
    assert {"linear", "bmm", "conv", "add", "gelu", "softmax", "max_pool", "cat", "transpose"} <= set(small)
    for case in small.values():
        sample = run_case(case, torch.bfloat16, "cpu", rounds=1)
        assert sample.number_bytes == 2
        assert sample.seconds > 0
    assert product_peak("cpu", "fp32", 64, rounds=1)
    assert dispatch_seconds("cpu", operators=10, rounds=1) > 0
    assert node_seconds(threads=1, rounds=1) >= 0


# Devices --------------------------------------------------------------------------------------------------------------


def samples_of(peak: float) -> list[Sample]:
    """Samples of products and elementwise operators that reach half of a peak and no more."""
    cases = [*PRODUCTS, *(stream_case(OperatorClass.ELEMENTWISE, "add", 1 << power) for power in (12, 16, 20, 24))]
    rates = Rates(compute=0.5, rows_half=2, fixed_us=1)
    return [
        Sample(
            case,
            4,
            seconds := rates.seconds(load_of(Sample(case, 4, 1, 1, 1), CACHE), peak, BANDWIDTH),
            seconds,
            seconds,
        )
        for case in cases
    ]


def wide_product() -> Operator:
    values: dict[str, Any] = {"attributes": {}, "live_bytes": 0, "path": "fc", "phase": "forward", "dtype": "float32"}
    return Operator(
        name="mm",
        inputs=((512, 1024), (1024, 1024)),
        outputs=((512, 1024),),
        kind=Kind.PRODUCT,
        work=Work(512 * 1024 * 1024),
        bytes_read=4 * (512 * 1024 + 1024 * 1024),
        weight_bytes=4 * 1024 * 1024,
        bytes_written=4 * 512 * 1024,
        **values,
    )


def test_a_measured_processor_is_saved_read_and_estimated_with() -> None:
    samples = samples_of(1e12)
    made = cpu_device(1, 2e10, {"fp32": 1e9, "int8": 2e12}, samples, 1e-6)
    save_device(made)
    found = device("auto")
    assert found == made
    peak = found.peak("fp32")
    assert peak is not None
    # The fastest probe counts where the square product was slower.
    assert peak.tflops * 1e12 == pytest.approx(max(2 * one.case.macs / one.seconds for one in samples), rel=1e-3)
    time = estimate([wide_product()], found, policy("fp32"))
    truth = 2 * 512 * 1024 * 1024 / 1e12 / 0.5
    assert time.runtime == "onnxruntime"
    assert time.seconds == pytest.approx(truth, rel=0.1)
    assert time.floor == pytest.approx(2 * 512 * 1024 * 1024 / (peak.tflops * 1e12))
    assert time.floor <= time.low <= time.seconds <= time.high


def test_a_measured_gpu_is_saved_and_read() -> None:
    made = cuda_device(
        CudaNumbers(
            name="NVIDIA Made Up",
            capability=(9, 0),
            memory_bytes=2**33,
            cache_bytes=CACHE,
            bandwidth=BANDWIDTH,
            products={"fp32": 5e11, "tf32": 8e11, "bf16": 1e12, "fp8": 2e12, "int8": 1e12},
            launch=1e-6,
            dispatch=5e-6,
            samples=samples_of(1e12),
            probed="bf16",
            torch="2.11",
        )
    )
    save_device(made)
    assert device("auto-cuda") == made
    assert made.supports("fp8")
    assert made.capability == (9, 0)
    assert made.launch is not None
    time = estimate([wide_product()], made, policy("bf16"))
    assert time.runtime == "torch"
    assert time.floor <= time.low <= time.seconds


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device to measure")
def test_measuring_a_gpu_where_there_is_none_is_an_error() -> None:
    with pytest.raises(RuntimeMissingError, match="CUDA"):
        measure_cuda()

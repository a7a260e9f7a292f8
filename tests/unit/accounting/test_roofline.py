"""The roofline: floors that hold, bounds that say why, bytes by precision, and errors that name what is missing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torchvision.models import resnet50

from narrowcast.accounting.classes import OperatorClass, Shape, class_of, shape_of
from narrowcast.accounting.counting import Work
from narrowcast.accounting.devices import Device, Memory, Peak, device, devices, save_device, user_catalogue
from narrowcast.accounting.efficiencies import Load, Rates, RuntimeModel, runtime_model
from narrowcast.accounting.fusion import absorbed
from narrowcast.accounting.kinds import Kind
from narrowcast.accounting.operators import Operator
from narrowcast.accounting.policies import POLICIES, policy
from narrowcast.accounting.roofline import estimate
from narrowcast.accounting.trace import fake_module, trace
from narrowcast.errors import DeviceError, RuntimeMissingError

MIB = 2**20


@pytest.fixture(autouse=True)
def _no_catalogue_of_ones_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))


def product(rows: int, depth: int, columns: int, *, path: str = "fc", **changes: Any) -> Operator:
    """A matrix product with weights in FP32."""
    weights = 4 * depth * columns
    values: dict[str, Any] = {
        "name": "mm",
        "path": path,
        "phase": "forward",
        "inputs": ((rows, depth), (depth, columns)),
        "outputs": ((rows, columns),),
        "dtype": "float32",
        "kind": Kind.PRODUCT,
        "attributes": {},
        "work": Work(rows * depth * columns),
        "bytes_read": 4 * rows * depth + weights,
        "weight_bytes": weights,
        "bytes_written": 4 * rows * columns,
        "live_bytes": 0,
    }
    return Operator(**values | changes)


def machine(
    *, asynchronous: bool = False, operator_us: float = 0.0, cache_mb: float | None = None, **rates: Any
) -> Device:
    """A device of 1 TFLOP/s and 100 GB/s, whose runtime reaches all of it unless told otherwise."""
    model = RuntimeModel(
        runtime="torch",
        asynchronous=asynchronous,
        operator_us=operator_us,
        low=0.8,
        high=1.5,
        classes={OperatorClass.PRODUCT: Rates(**rates)},
        source="made up for a test",
    )
    return Device(
        name="test",
        title="Test",
        vendor="nobody",
        kind="gpu",
        architecture="none",
        year=2024,
        formats=("fp32", "bf16"),
        memory=Memory(stated_gbs=100, cache_mb=cache_mb, source="made up"),
        peaks=(
            Peak(dtype="fp32", unit="vector", tflops=1, source="made up"),
            Peak(dtype="bf16", unit="tensor core", tflops=4, source="made up"),
        ),
        runtimes=(model,),
        source="made up for a test",
    )


# Time and what it is spent on -----------------------------------------------------------------------------------------


def test_a_large_product_takes_its_flops_at_the_peak() -> None:
    found = estimate([product(4096, 4096, 4096)], machine(), policy("fp32"))
    assert found.seconds == pytest.approx(2 * 4096**3 / 1e12)
    assert found.operators[0].bound == "compute"
    assert found.shares["compute"] == 1.0


def test_a_product_of_one_row_takes_its_weights_at_the_bandwidth() -> None:
    found = estimate([product(1, 4096, 4096)], machine(), policy("fp32"))
    assert found.seconds == pytest.approx((4 * 4096 * 4096 + 8 * 4096) / 100e9)
    assert found.operators[0].bound == "memory"


@pytest.mark.parametrize(("name", "bits"), [("fp32", 32), ("bf16", 16), ("int8", 8), ("int4", 4), ("nf4", 4)])
def test_weights_take_the_bits_of_the_policy(name: str, bits: int) -> None:
    activations = 4 if name == "fp32" else 2
    found = estimate([product(1, 4096, 4096)], machine(), policy(name))
    assert found.seconds == pytest.approx((4096 * 4096 * bits / 8 + 2 * 4096 * activations) / 100e9)


def test_a_run_counted_in_bf16_has_the_same_bytes_as_one_counted_in_fp32() -> None:
    single = product(1, 512, 512)
    half = product(
        1,
        512,
        512,
        dtype="bfloat16",
        bytes_read=single.bytes_read // 2,
        weight_bytes=single.weight_bytes // 2,
        bytes_written=single.bytes_written // 2,
    )
    for name in ("fp32", "bf16", "int4"):
        times = [estimate([one], machine(), policy(name)).seconds for one in (single, half)]
        assert times[0] == pytest.approx(times[1])


def test_small_products_reach_half_of_the_peak_at_the_half_sizes() -> None:
    load = Load(flops=1e9, shape=Shape(1, 8, 1000, 1000), moved=0)
    assert Rates(rows_half=8).compute_seconds(load, 1e12) == pytest.approx(2e-3)
    assert Rates(compute=0.5, outputs_half=8000).compute_seconds(load, 1e12) == pytest.approx(4e-3)


def test_an_operator_of_a_serial_runtime_costs_its_overhead_on_top() -> None:
    found = estimate([product(1, 8, 8)] * 10, machine(operator_us=5), policy("fp32"))
    assert found.seconds == pytest.approx(50e-6, rel=0.01)
    assert found.operators[3].bound == "overhead"


def test_the_slower_of_host_and_device_decides_where_the_host_queues() -> None:
    small, large = product(1, 8, 8), product(2048, 2048, 2048)
    device_seconds = 2 * 2048**3 / 1e12
    quick = estimate([large] * 4 + [small] * 4, machine(asynchronous=True, operator_us=5), policy("fp32"))
    assert quick.seconds == pytest.approx(4 * device_seconds + 5e-6, rel=1e-3)  # the host queued during the first
    slow = estimate([small] * 1000, machine(asynchronous=True, operator_us=5), policy("fp32"))
    assert slow.seconds == pytest.approx(5e-3, rel=0.01)
    assert slow.shares["overhead"] > 0.99


def test_times_add_up_and_views_take_none() -> None:
    view = product(1, 8, 8, kind=Kind.VIEW, work=Work(), bytes_read=0, weight_bytes=0, bytes_written=0)
    found = estimate([view, product(64, 64, 64), view], machine(), policy("fp32"))
    assert found.seconds == pytest.approx(math.fsum(time.seconds for time in found.operators))
    assert [time.bound for time in found.operators] == ["none", found.operators[1].bound, "none"]
    assert sum(found.shares.values()) == pytest.approx(1.0)


def test_throughput_counts_samples() -> None:
    found = estimate([product(64, 64, 64)], machine(), policy("fp32"), samples=8)
    assert found.throughput == pytest.approx(8 / found.seconds)


# What physics allows --------------------------------------------------------------------------------------------------


@given(
    sizes=st.lists(st.tuples(*[st.integers(1, 3000)] * 3), min_size=1, max_size=6),
    compute=st.floats(0.01, 1),
    cached=st.floats(0.1, 40),
    cache=st.one_of(st.none(), st.floats(0.1, 64)),
    asynchronous=st.booleans(),
)
def test_no_estimate_is_faster_than_physics(
    sizes: list[tuple[int, int, int]], compute: float, cached: float, cache: float | None, asynchronous: bool
) -> None:
    operators = [product(*size, path=f"fc{place}") for place, size in enumerate(sizes)]
    found = estimate(
        operators, machine(asynchronous=asynchronous, cache_mb=cache, compute=compute, cached=cached), policy("fp32")
    )
    flops = sum(2 * math.prod(size) for size in sizes)
    weights = sum(4 * depth * columns for _, depth, columns in sizes)
    assert found.floor >= flops / 1e12 * (1 - 1e-9)
    assert found.floor >= (weights - (cache or 0) * MIB) / 100e9 * (1 - 1e-9)
    assert found.floor <= found.low <= found.seconds <= found.high


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int8-static"])
def test_every_catalogue_device_gives_a_time_or_says_what_is_missing(precision: str) -> None:
    times = 0
    for found in devices():
        try:
            made = estimate([product(64, 512, 512)], found, policy(precision))
        except DeviceError as error:
            assert error.allowed or error.next_step  # noqa: PT017
            continue
        times += 1
        assert 0 < made.floor <= made.low <= made.seconds <= made.high < 1
    assert times > 20


# Accelerators of integers ---------------------------------------------------------------------------------------------

#: Samples per second: Hailo Model Zoo, classification on Hailo-8, Dataflow Compiler 3.27.
PUBLISHED = {"mobilenetv2_100": 2434, "efficientnet_es": 1036, "resnet34": 1346}


@pytest.mark.parametrize("name", PUBLISHED)
def test_an_accelerator_takes_what_its_vendor_publishes_within_the_band(name: str) -> None:
    import timm

    module, mode = fake_module(lambda: timm.create_model(name))
    run = trace(module, (torch.empty(1, 3, 224, 224),), mode=mode)
    found = estimate(run.operators, device("hailo-8"), policy("int8-static"))
    assert found.runtime == "compiled"
    assert found.low < 1 / PUBLISHED[name] < found.high
    assert found.floor == pytest.approx(2 * run.macs / 26e12)
    assert found.notes == (
        "times are of a graph that the vendor's compiler made",
        "nobody states the memory bandwidth of Hailo-8: what moving bytes takes is left out",
    )


def test_an_accelerator_of_integers_alone_refuses_what_multiplies_floats() -> None:
    for name in ("fp32", "int8", "int4"):
        with pytest.raises(DeviceError, match="Hailo-8 does not multiply") as caught:
            estimate([product(1, 8, 8)], device("hailo-8"), policy(name))
        assert caught.value.allowed == "int8-static"


def test_static_int8_is_not_computed_in_a_wider_format() -> None:
    assert not device("p100").supports("int8")
    assert estimate([product(1, 8, 8)], device("p100"), policy("int8")).precision == "int8"  # weights alone
    with pytest.raises(DeviceError, match="does not multiply in int8"):
        estimate([product(1, 8, 8)], device("p100"), policy("int8-static"))


def test_integer_policies_answer_to_what_the_field_calls_them() -> None:
    assert policy("W8A8") is POLICIES["int8-static"]
    assert policy("w8a16") is POLICIES["int8"]
    assert POLICIES["int8"].weight_only
    assert not POLICIES["int8-static"].weight_only


# Fusion ---------------------------------------------------------------------------------------------------------------


def test_onnx_runtime_folds_what_convolutions_do_themselves_and_torch_runs_each() -> None:
    block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.AvgPool2d(2))
    operators = trace(block, (torch.randn(1, 8, 16, 16),)).operators
    free = {operators[place].name for place in absorbed(operators, "onnxruntime")}
    assert {"relu", "convolution", "avg_pool2d"} & free == {"relu"}
    assert any("batch_norm" in name for name in free)
    assert absorbed(operators, "torch") == frozenset()


def test_a_result_that_two_operators_read_is_not_folded_away() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x)
            return torch.relu(y).mean() + y.sum()

    operators = trace(Both(), (torch.randn(1, 8, 16, 16),)).operators
    assert "relu" not in {operators[place].name for place in absorbed(operators, "onnxruntime")}


def test_a_recurrent_layer_is_its_products_and_reads_its_weights_once() -> None:
    operators = trace(nn.LSTM(512, 512, batch_first=True), (torch.randn(1, 20, 512),)).operators
    free = absorbed(operators, "onnxruntime")
    kept = [
        operator for place, operator in enumerate(operators) if operator.kind is not Kind.VIEW and place not in free
    ]
    assert kept
    assert {operator.kind for operator in kept} == {Kind.PRODUCT}
    found = estimate(operators, machine(), policy("fp32"))
    weights = 4 * 2 * 4 * 512 * 512
    assert found.floor == pytest.approx(weights / 100e9, rel=0.02)


# Classes and shapes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "kind", "shape"),
    [
        (nn.Conv2d(3, 16, 3), OperatorClass.IMAGE, Shape(1, 900, 16, 27)),
        (nn.Conv2d(8, 16, 3), OperatorClass.CONVOLUTION, Shape(1, 900, 16, 72)),
        (nn.Conv2d(8, 16, 1), OperatorClass.POINTWISE, Shape(1, 1024, 16, 8)),
        (nn.Conv2d(8, 16, 3, groups=2), OperatorClass.GROUPED, Shape(2, 900, 8, 36)),
        (nn.Conv2d(8, 8, 3, groups=8), OperatorClass.DEPTHWISE, Shape(8, 900, 1, 9)),
    ],
)
def test_a_convolution_is_a_product_of_its_class(layer: nn.Conv2d, kind: OperatorClass, shape: Shape) -> None:
    operators = trace(layer, (torch.randn(1, layer.in_channels, 32, 32),)).operators
    operator = next(one for one in operators if one.name == "convolution")
    assert class_of(operator) is kind
    assert shape_of(operator) == shape


def test_attention_is_one_product_with_both_of_its_depths() -> None:
    q = torch.randn(2, 4, 10, 16)
    module = type(
        "Attention", (nn.Module,), {"forward": lambda self, x: nn.functional.scaled_dot_product_attention(x, x, x)}
    )()
    operator = next(one for one in trace(module, (q,)).operators if one.kind is Kind.ATTENTION)
    shape = shape_of(operator)
    assert shape is not None
    assert operator.work is not None
    assert math.prod(shape) == operator.work.macs


# Errors ---------------------------------------------------------------------------------------------------------------


def test_a_precision_that_the_hardware_lacks_names_those_that_it_has() -> None:
    with pytest.raises(DeviceError, match="NVIDIA T4 does not multiply in bf16") as caught:
        estimate([], device("t4"), policy("bf16"))
    assert caught.value.allowed.split(", ") == [
        name for name, one in POLICIES.items() if one.compute in ("fp32", "fp16", "int8")
    ]


def test_a_device_without_bandwidth_says_so() -> None:
    bare = machine().model_copy(update={"memory": Memory()})
    with pytest.raises(DeviceError, match="bandwidth"):
        estimate([], bare, policy("fp32"))


def test_a_runtime_that_nobody_fitted_is_an_error() -> None:
    with pytest.raises(RuntimeMissingError, match="tflite"):
        runtime_model("cpu", "tflite")


def test_a_device_of_another_ridge_gets_larger_shares_up_to_those_of_products_and_a_band_of_its_own() -> None:
    packaged = runtime_model("gpu", "torch")
    assert packaged.ridge is not None
    slow = OperatorClass.DEPTHWISE
    share = packaged.rates(slow).compute
    assert packaged.elsewhere(packaged.ridge / 2).rates(slow).compute == pytest.approx(2 * share)
    assert packaged.elsewhere(1.0).rates(slow).compute == packaged.rates(OperatorClass.PRODUCT).compute
    assert packaged.elsewhere(2 * packaged.ridge).rates(slow) == packaged.rates(slow)
    assert packaged.peak is not None
    busy = packaged.rates(OperatorClass.CONVOLUTION).outputs_half
    assert (
        packaged.elsewhere(packaged.ridge, packaged.peak / 8).rates(OperatorClass.CONVOLUTION).outputs_half == busy / 8
    )
    assert packaged.elsewhere(1.0).low == packaged.elsewhere_low < packaged.low


def test_rates_without_a_ridge_are_the_same_shares_of_every_devices_peaks() -> None:
    packaged = runtime_model("cpu", "onnxruntime")
    assert packaged.ridge is None
    there = packaged.elsewhere(1.0, 1e9)
    assert there.classes == packaged.classes
    assert (there.low, there.high) == (packaged.low, packaged.high)  # nobody has looked elsewhere


def test_one_image_does_not_take_a_smaller_device_longer_for_sums_that_wait_for_latency() -> None:
    """ResNet-50's convolutions at batch 1 in FP32: a T4 multiplies them at no less than a fifth of its peak."""
    module, mode = fake_module(resnet50)
    run = trace(module, (torch.empty(1, 3, 224, 224),), mode=mode)
    found = estimate(run.operators, device("t4"), policy("fp32"))
    kernels = sum(max(time.compute, time.memory) for time in found.operators)
    assert found.floor < kernels < 5 * found.floor
    assert found.notes[0].startswith("times are of eager PyTorch")


def test_a_machine_that_is_not_measured_says_how() -> None:
    with pytest.raises(DeviceError, match="not measured") as caught:
        device("auto")
    assert "narrowcast devices --measure cpu" in caught.value.next_step


# The user's catalogue -------------------------------------------------------------------------------------------------


def test_a_measured_device_is_written_beside_what_the_user_wrote_and_replaced_by_the_next() -> None:
    by_hand = '# mine\n[[device]]\nname = "board"\ntitle = "Board"\nvendor = "Me"\nkind = "npu"\n'
    by_hand += 'architecture = "a"\nyear = 2024\nformats = ["int8"]\nsource = "measured by me, 2024"\n'
    user_catalogue().parent.mkdir(parents=True)
    user_catalogue().write_text(by_hand, encoding="utf-8")
    first = machine(cache_mb=4).model_copy(update={"name": "auto"})
    second = first.model_copy(update={"title": 'again, with "quotes" and \\'})
    for found in (first, second):
        save_device(found)
        assert device("auto") == found
    text = user_catalogue().read_text(encoding="utf-8")
    assert text.startswith(by_hand)
    assert text.count('name = "auto"') == 1
    assert device("board").title == "Board"


def test_a_device_that_the_user_describes_by_hand_is_not_overwritten() -> None:
    save_device(machine().model_copy(update={"name": "auto"}))
    path = user_catalogue()
    path.write_text(path.read_text(encoding="utf-8").replace("# auto: measured\n", ""), encoding="utf-8")
    with pytest.raises(DeviceError, match="by hand"):
        save_device(machine().model_copy(update={"name": "auto"}))

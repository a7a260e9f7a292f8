"""The roofline: how long a run takes on a device, operator by operator, and what each one waits for.

Each operator takes its work at the share of the peak that its class reaches, or its bytes at the share of the bandwidth,
whichever is longer, and a fixed cost on top. Where the host only queues kernels (PyTorch on GPUs), an operator whose kernel
has to wait for the host is overhead-bound.

>>> from narrowcast.accounting.devices import device
>>> from narrowcast.accounting.policies import policy
>>> estimate([], device("h100"), policy("bf16")).seconds
0.0
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from narrowcast.accounting.classes import class_of, shape_of
from narrowcast.accounting.devices import Device
from narrowcast.accounting.efficiencies import Load, RuntimeModel, runtime_model
from narrowcast.accounting.fusion import absorbed, recurrent_paths
from narrowcast.accounting.kinds import Kind
from narrowcast.accounting.operators import Operator
from narrowcast.accounting.policies import POLICIES, Policy
from narrowcast.accounting.traffic import traffic
from narrowcast.errors import DeviceError

__all__ = ["Bound", "Estimate", "OperatorTime", "estimate"]

Bound = Literal["compute", "memory", "overhead", "none"]
BOUNDS: tuple[Bound, ...] = ("compute", "memory", "overhead", "none")


class OperatorTime(NamedTuple):
    """What one operator takes.

    Args:
        operator: Its place among the operators.
        seconds: Its share of the whole run; 0 if it is a view or runs inside another one's kernel.
        bound: What takes most of it; ``none`` if it takes nothing.
        compute: Seconds that its arithmetic takes.
        memory: Seconds that its bytes take.
        overhead: Seconds that it costs however small it is, waiting for the host included.
    """

    operator: int
    seconds: float
    bound: Bound
    compute: float
    memory: float
    overhead: float


class Estimate(BaseModel):
    """How long one run takes on a device.

    Args:
        device: Its name.
        precision: The policy's name.
        runtime: Whose kernels.
        seconds: The estimate.
        low: The band's lower end, seconds; never below ``floor``.
        high: The band's upper end, seconds.
        floor: Seconds below which no runtime gets: all products at the peak, or all weights once at the full bandwidth.
        throughput: Samples per second.
        shares: Of the time, by what it is spent waiting for.
        operators: One for each operator given; no part of the JSON.
        source: Where the efficiencies come from.
        notes: What it is an estimate of, and what it leaves out on this device.
    """

    model_config = ConfigDict(frozen=True)

    device: str
    precision: str
    runtime: str
    seconds: float
    low: float
    high: float
    floor: float
    throughput: float
    shares: dict[Bound, float]
    operators: tuple[OperatorTime, ...] = Field(default=(), exclude=True, repr=False)
    source: str = ""
    notes: tuple[str, ...] = ()


class _Machine(NamedTuple):
    """What the times follow from."""

    peak: float  # FLOP/s
    bandwidth: float  # B/s
    cache: int  # bytes
    model: RuntimeModel


class _Kernel(NamedTuple):
    """What one operator takes on the device and on the host, in seconds."""

    operator: int
    compute: float = 0.0
    memory: float = 0.0
    fixed: float = 0.0
    host: float = 0.0


def estimate(
    operators: Sequence[Operator],
    device: Device,
    policy: Policy,
    *,
    runtime: str | None = None,
    samples: int = 1,
    slower: Mapping[int, float] | None = None,
) -> Estimate:
    """Return how long a run takes.

    Args:
        operators: The run, counted in FP32 or in whatever dtype; bytes of floating tensors are scaled to the policy's.
        device: Where it runs.
        policy: Formats of weights, activations and products.
        runtime: ``onnxruntime``, ``torch`` or ``compiled``; by the device's kind unless given.
        samples: Samples in the run's batch, for the throughput.
        slower: How many times longer the arithmetic of an operator takes than that of its class, by the operator's place.

    Raises:
        DeviceError: The device does not multiply in the policy's format, or its peak or bandwidth is not known; of an
            accelerator whose bandwidth nobody states, bytes are left out, which ``notes`` say.
        RuntimeMissingError: Nothing is known of that runtime on such devices.
    """
    policy = _computed(device, policy)
    machine = _machine(device, policy, runtime)
    free = absorbed(operators, machine.model.runtime)
    weights = _Weights(operators, policy)
    kernels = [
        _Kernel(place)
        if place in free
        else _kernel(place, operator, machine, policy, weights, (slower or {}).get(place, 1.0))
        for place, operator in enumerate(operators)
    ]
    times = tuple(_queued(kernels) if machine.model.asynchronous else _serial(kernels))
    macs = sum(operator.work.macs for operator in operators if operator.work)
    floor = max(2 * macs / machine.peak, max(weights.total - machine.cache, 0.0) / machine.bandwidth)
    seconds = max(math.fsum(time.seconds for time in times), floor)
    by_bound: dict[Bound, float] = {
        bound: math.fsum(time.seconds for time in times if time.bound == bound) for bound in BOUNDS
    }
    return Estimate(
        device=device.name,
        precision=policy.name,
        runtime=machine.model.runtime,
        seconds=seconds,
        low=max(seconds * machine.model.low, floor),
        high=seconds * machine.model.high,
        floor=floor,
        throughput=samples / seconds if seconds else 0.0,
        shares={bound: value / seconds if seconds else 0.0 for bound, value in by_bound.items()},
        operators=times,
        source=machine.model.source,
        notes=(_RUN_BY.get(machine.model.runtime, f"times are of {machine.model.runtime}"), *_left_out(device)),
    )


def _computed(device: Device, policy: Policy) -> Policy:
    """Return the policy with products in a format that the device has, if only its weights are narrow."""
    if not policy.weight_only or device.supports(policy.compute):
        return policy
    wide = next((name for name in ("fp16", "fp32") if device.supports(name)), policy.compute)
    return policy._replace(compute=wide, activations=wide, rest=wide)


def _machine(device: Device, policy: Policy, runtime: str | None) -> _Machine:
    usable = ", ".join(name for name, other in POLICIES.items() if device.peak(other.compute)) or "none"
    if not device.supports(policy.compute):
        raise DeviceError(
            f"{device.title} does not multiply in {policy.compute}, which {policy.name} asks for", allowed=usable
        )
    peak = device.peak(policy.compute)
    if peak is None:
        raise DeviceError(
            f"nobody states how fast {device.title} multiplies in {policy.compute}",
            allowed=usable,
            next_step="describe it in the catalogue of your own, or measure it there: narrowcast devices --measure cpu",
        )
    if device.memory.bandwidth is None and device.kind != "npu":
        raise DeviceError(
            f"nobody states the memory bandwidth of {device.title}",
            next_step="describe it in the catalogue of your own, or measure it there: narrowcast devices --measure cpu",
        )
    bandwidth = math.inf if device.memory.bandwidth is None else device.memory.bandwidth * 1e9
    own = {model.runtime: model for model in device.runtimes}
    name = runtime or next(iter(own), None)
    model = own.get(name or "")
    if model is None:
        model = runtime_model(device.kind, name).elsewhere(peak.tflops * 1e12 / bandwidth, peak.tflops * 1e12)
    cache = round((device.memory.cache_mb or 0.0) * 2**20)
    return _Machine(peak.tflops * 1e12, bandwidth, cache, model)


_RUN_BY = {
    "torch": "times are of eager PyTorch on a host like the one that was measured; runtimes that start whole graphs (TensorRT, "
    "CUDA graphs) do not wait for the host",
    "onnxruntime": "times are of ONNX Runtime",
    "compiled": "times are of a graph that the vendor's compiler made",
}


def _left_out(device: Device) -> tuple[str, ...]:
    if device.memory.bandwidth is not None:
        return ()
    return (f"nobody states the memory bandwidth of {device.title}: what moving bytes takes is left out",)


class _Weights:
    """What a run reads of weights, each once.

    Attributes:
        total: Bytes of all of them.
        again: Places of the operators whose weights were read before in the same run, as recurrent layers do.
    """

    def __init__(self, operators: Sequence[Operator], policy: Policy) -> None:
        recurrent = recurrent_paths(operators)
        seen: set[tuple[str, tuple[tuple[int, ...], ...]]] = set()
        self.total, self.again = 0.0, set[int]()
        for place, operator in enumerate(operators):
            if not operator.weight_bytes:
                continue
            if operator.path in recurrent:
                if (operator.path, operator.inputs) in seen:
                    self.again.add(place)
                    continue
                seen.add((operator.path, operator.inputs))
            self.total += traffic(operator, policy).weights


def _kernel(
    place: int, operator: Operator, machine: _Machine, policy: Policy, weights: _Weights, slower: float
) -> _Kernel:
    host = machine.model.operator_us * 1e-6
    if operator.kind is Kind.VIEW:
        return _Kernel(place, host=host * machine.model.view)
    own, read, written = traffic(operator, policy)
    load = Load(
        flops=2.0 * operator.work.macs if operator.work else 0.0,
        shape=shape_of(operator),
        moved=read + written,
        weights=own,
        cached=read + written <= machine.cache,
        weights_cached=(own if place in weights.again else weights.total) <= machine.cache,
    )
    rates = machine.model.rates(class_of(operator))
    return _Kernel(
        place,
        compute=slower * rates.compute_seconds(load, machine.peak),
        memory=rates.memory_seconds(load, machine.bandwidth),
        fixed=rates.fixed_us * 1e-6,
        host=host * rates.host,
    )


def _serial(kernels: Sequence[_Kernel]) -> Iterator[OperatorTime]:
    """Yield the times where one operator ends before the next begins."""
    for kernel in kernels:
        yield _time(kernel, kernel.host + kernel.fixed)


def _queued(kernels: Sequence[_Kernel]) -> Iterator[OperatorTime]:
    """Yield the times where the host queues kernels, and the device runs them one after another."""
    host = done = 0.0
    for kernel in kernels:
        host += kernel.host
        longest = max(kernel.compute, kernel.memory)
        if not longest:  # views reach no device
            yield _time(kernel, 0.0)
            continue
        time = _time(kernel, max(host - done, 0.0) + kernel.fixed)
        done += time.seconds
        yield time


def _time(kernel: _Kernel, overhead: float) -> OperatorTime:
    parts: dict[Bound, float] = {"compute": kernel.compute, "memory": kernel.memory, "overhead": overhead}
    seconds = max(kernel.compute, kernel.memory) + overhead
    bound: Bound = max(parts, key=lambda name: parts[name]) if seconds else "none"
    return OperatorTime(kernel.operator, seconds, bound, kernel.compute, kernel.memory, overhead)

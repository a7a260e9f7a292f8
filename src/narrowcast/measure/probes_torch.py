"""Probes on PyTorch: what its eager kernels take, and what its dispatcher costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import cycle
from statistics import median
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from narrowcast.accounting.classes import OperatorClass
from narrowcast.measure.probes import (
    Case,
    Sample,
    attention_case,
    batched_case,
    convolution_case,
    host_times,
    product_case,
    stream_case,
)

__all__ = ["copy_bandwidth", "dispatch_seconds", "gpu_cases", "launch_seconds", "product_peak", "run_case"]

#: Launches of one kernel that are timed together.
_LAUNCHES = 20
#: Weights are taken in turn from so many copies that no cache holds them all.
_COLD_BYTES = 256 << 20


def gpu_cases() -> Iterator[Case]:
    """Yield cases of the sizes that networks have on GPUs."""
    for rows in (1, 16, 128, 512, 2048, 8192):
        for inputs, outputs in ((768, 768), (768, 3072), (3072, 768), (2048, 8192), (8192, 2048), (4096, 4096)):
            yield product_case(rows, inputs, outputs)
    for batch in (12, 96, 384):
        for tokens in (64, 197, 256, 512):
            yield batched_case(batch, tokens, 64, tokens)
            yield batched_case(batch, tokens, tokens, 64)
    for batch, heads in ((1, 12), (8, 12), (32, 12), (1, 32)):
        for tokens in (128, 197, 512, 2048):
            if batch * tokens <= 16384:
                yield attention_case(batch, heads, tokens, 64)
    for batch in (1, 8, 32):
        for channels, pixels in ((64, 56), (128, 28), (256, 14), (512, 7)):
            yield convolution_case(batch, channels, channels, pixels, 3)
            yield convolution_case(batch, channels, 4 * channels, pixels, 1)
            yield convolution_case(batch, 4 * channels, channels, pixels, 1)
            yield convolution_case(batch, 2 * channels, 2 * channels, pixels, 3, groups=32)
        yield convolution_case(batch, 3, 64, 224, 7, stride=2)
        yield convolution_case(batch, 3, 32, 224, 3, stride=2)
        yield convolution_case(batch, 3, 96, 224, 4, stride=4)
        yield convolution_case(batch, 3, 768, 224, 16, stride=16)
        for channels, pixels in ((96, 112), (144, 56), (192, 28), (576, 14), (960, 7)):
            yield convolution_case(batch, channels, channels, pixels, 3, groups=channels)
        for channels, pixels in ((96, 56), (192, 28), (384, 14), (768, 7)):
            yield convolution_case(batch, channels, channels, pixels, 7, groups=channels)
    for numbers in (1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 24, 1 << 26):
        rows = numbers // 1024
        yield stream_case(OperatorClass.ELEMENTWISE, "add", numbers, passes=3)
        yield stream_case(OperatorClass.ELEMENTWISE, "relu", numbers)
        yield stream_case(OperatorClass.TRANSCENDENTAL, "gelu", numbers)
        yield stream_case(OperatorClass.TRANSCENDENTAL, "silu", numbers)
        yield stream_case(OperatorClass.NORMALISATION, "layer_norm", rows, 1024)
        yield stream_case(OperatorClass.NORMALISATION, "batch_norm", numbers // (64 * 256), 64, 16, 16)
        yield stream_case(OperatorClass.SOFTMAX, "softmax", rows * 4, 256)
        yield stream_case(OperatorClass.REDUCTION, "mean", rows, 1024, passes=1)
        yield stream_case(OperatorClass.POOLING, "max_pool", numbers // (64 * 256), 64, 16, 16)
        yield stream_case(OperatorClass.MOVE, "transpose", rows, 16, 64)
        yield stream_case(OperatorClass.MOVE, "cat", numbers)


def _call(case: Case, dtype: torch.dtype, device: str) -> Callable[[], Any]:
    """Return a function that runs the case once; each call takes the next of several weights."""

    def new(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    sizes = case.sizes
    size = dtype.itemsize
    copies = min(max(1, -(-_COLD_BYTES // max(case.weights * size, 1))), _LAUNCHES) if case.weights else 1
    if case.name == "linear":
        x, weights = new(sizes[0], sizes[1]), cycle([new(sizes[2], sizes[1]) for _ in range(copies)])
        return lambda: F.linear(x, next(weights))
    if case.name == "conv":
        batch, inputs, outputs, pixels, kernel, stride, groups = sizes
        x = new(batch, inputs, pixels, pixels)
        weights = cycle([new(outputs, inputs // groups, kernel, kernel) for _ in range(copies)])
        padding = 0 if stride == kernel else kernel // 2
        return lambda: F.conv2d(x, next(weights), None, stride, padding, 1, groups)
    if case.name == "bmm":
        batch, rows, inputs, outputs = sizes
        a, b = new(batch, rows, inputs), new(batch, inputs, outputs)
        return lambda: torch.bmm(a, b)
    if case.name == "sdpa":
        q, k, v = (new(*sizes) for _ in range(3))
        return lambda: F.scaled_dot_product_attention(q, k, v)
    x, other = new(*sizes), new(*sizes)
    if case.name == "batch_norm":
        mean, variance = (torch.ones(sizes[1], device=device, dtype=dtype) for _ in range(2))
        return lambda: F.batch_norm(x, mean, variance, mean, variance)
    halves = x[: sizes[0] // 2], other[sizes[0] // 2 :]
    calls: dict[str, Callable[[], Any]] = {
        "add": lambda: x + other,
        "relu": lambda: F.relu(x),
        "gelu": lambda: F.gelu(x),
        "silu": lambda: F.silu(x),
        "layer_norm": lambda: F.layer_norm(x, sizes[-1:]),
        "softmax": lambda: F.softmax(x, -1),
        "mean": lambda: x.mean(-1),
        "max_pool": lambda: F.max_pool2d(x, 3, 1, 1),
        "transpose": lambda: x.transpose(1, 2).contiguous(),
        "cat": lambda: torch.cat(halves),
    }
    return calls[case.name]


def run_case(case: Case, dtype: torch.dtype, device: str, *, rounds: int = 9) -> Sample:
    """Return what a case takes.

    On a GPU the kernels alone are timed: :data:`_LAUNCHES` of them, captured as one graph, between two events.

    Args:
        case: What to run.
        dtype: Of its tensors.
        device: ``cpu`` or ``cuda``.
        rounds: Times that it is timed.
    """
    call = _call(case, dtype, device)
    with torch.inference_mode():
        times = _graph_times(call, rounds) if device == "cuda" else host_times(call, rounds)
    low, high = np.percentile(times, [10, 90])
    return Sample(case, dtype.itemsize, float(median(times)), float(low), float(high))


def _graph_times(call: Callable[[], Any], rounds: int) -> list[float]:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(_LAUNCHES):
            call()
    graph.replay()
    return [seconds / _LAUNCHES for seconds in _event_times(graph.replay, rounds)]


def _event_times(call: Callable[[], Any], rounds: int) -> list[float]:
    times: list[float] = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return times


def timed(call: Callable[[], Any], device: str, rounds: int) -> list[float]:
    """Return the seconds of each call, on the device's own clock."""
    call()
    return _event_times(call, rounds) if device == "cuda" else host_times(call, rounds)


def copy_bandwidth(device: str, numbers: int, *, rounds: int = 15) -> float:
    """Return the bytes per second that copying an FP32 tensor reads and writes.

    Args:
        device: ``cpu`` or ``cuda``.
        numbers: Of the tensor; many for the memory, few for a cache.
        rounds: Times that it is timed; the median counts.
    """
    source, target = (torch.zeros(numbers, device=device) for _ in range(2))
    copies = max(1, (1 << 24) // numbers)

    def copy() -> None:
        for _ in range(copies):
            target.copy_(source)

    return 8 * numbers * copies / median(timed(copy, device, rounds))


def product_peak(device: str, dtype: str, size: int, *, rounds: int = 15) -> float | None:
    """Return the FLOP/s of a product of square matrices; None where PyTorch has no kernel for it.

    Args:
        device: ``cpu`` or ``cuda``.
        dtype: ``fp32``, ``tf32``, ``bf16``, ``fp16``, ``fp8`` or ``int8``.
        size: Rows and columns.
        rounds: Times that it is timed; the fastest counts, for it bounds what others can reach.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    try:
        call = _square(device, dtype, size)
        return 2 * size**3 / min(timed(call, device, rounds))
    except (RuntimeError, NotImplementedError, AttributeError):
        return None
    finally:
        torch.set_float32_matmul_precision(before)


def _square(device: str, dtype: str, size: int) -> Callable[[], Any]:
    x, y = (torch.randn(size, size, device=device) for _ in range(2))
    if dtype == "int8":
        a, b = ((value * 20).to(torch.int8) for value in (x, y))
        return lambda: torch._int_mm(a, b)  # pyright: ignore[reportPrivateUsage]
    if dtype == "fp8":
        a, b = (value.to(torch.float8_e4m3fn) for value in (x, y))
        one = torch.ones((), device=device)
        return lambda: torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16)  # pyright: ignore[reportPrivateUsage]
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(dtype, torch.float32)
    a, b = x.to(kind), y.to(kind)
    return lambda: torch.mm(a, b)


def dispatch_seconds(device: str, *, operators: int = 400, rounds: int = 15) -> float:
    """Return the seconds from one small eager operator to the next, when nothing but the host is slow."""
    x = torch.zeros(8, device=device)

    def queue() -> None:
        y = x
        for _ in range(operators):
            y = torch.relu(y)

    with torch.inference_mode():
        return median(timed(queue, device, rounds)) / operators


def launch_seconds(*, rounds: int = 15) -> float:
    """Return the seconds from one small kernel to the next in a CUDA graph, where the host has no part."""
    x = torch.zeros(8, device="cuda")
    with torch.inference_mode():
        return median(_graph_times(lambda: torch.relu(x), rounds))

"""From what probes took to the shares of the peaks that classes of operators reach."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import optimize

from narrowcast.accounting.classes import OperatorClass
from narrowcast.accounting.efficiencies import Load, Rates
from narrowcast.measure.probes import Sample

__all__ = ["fit", "fit_class", "load_of", "residuals"]

Floats = NDArray[np.float64]

#: Parameters, the bounds of each, and where the search begins.
_HALVES = {"rows_half": (1e-3, 1e3, 1.0), "columns_half": (1e-3, 1e3, 1.0), "depth_half": (1e-3, 1e3, 1.0)}
_OUTPUTS = {"outputs_half": (1e-3, 1e7, 10.0)}
_COMPUTE = {"compute": (1e-4, 1.0, 0.7)}
_MEMORY = {"bandwidth": (1e-3, 4.0, 0.7), "cached": (1e-3, 50.0, 1.0)}
_WEIGHTS = {"weights": (1e-2, 1.0, 0.8)}
#: What a log of the ratio of times counts at most as, so that one odd probe does not decide.
_ODD = 0.2


def load_of(sample: Sample, cache: int) -> Load:
    """Return what a probe had to do; its weights are cold if they are large, as those of whole networks are.

    Args:
        sample: What a case took.
        cache: Bytes of the largest cache.
    """
    case, size = sample.case, sample.number_bytes
    moved, weights = float(case.moved * size), float(case.weights * size)
    return Load(2.0 * case.macs, case.shape, moved, weights, moved <= cache, weights <= cache / 2)


def fit(
    samples: Iterable[Sample],
    *,
    peak: float,
    bandwidth: float,
    cache: int,
    kernel_seconds: float = 0.0,
    parallel: bool = False,
) -> dict[OperatorClass, Rates]:
    """Return the rates of every class that was probed.

    Args:
        samples: What the probes took.
        peak: FLOP/s in the probes' format.
        bandwidth: Bytes per second.
        cache: Bytes of the largest cache.
        kernel_seconds: What each kernel takes however small it is.
        parallel: Whether small products leave parts of the device idle (GPUs).
    """
    by_class: dict[OperatorClass, list[Sample]] = defaultdict(list)
    for sample in samples:
        by_class[sample.case.kind].append(sample)
    return {
        kind: fit_class(
            found, peak=peak, bandwidth=bandwidth, cache=cache, kernel_seconds=kernel_seconds, parallel=parallel
        )
        for kind, found in sorted(by_class.items())
    }


def fit_class(
    samples: Sequence[Sample],
    *,
    peak: float,
    bandwidth: float,
    cache: int,
    kernel_seconds: float = 0.0,
    parallel: bool = False,
) -> Rates:
    """Return the rates that explain one class's samples best: least squares of the logs of ratios, odd ones damped."""
    loads = [load_of(sample, cache) for sample in samples]
    wanted: dict[str, tuple[float, float, float]] = dict(_MEMORY)
    if any(load.flops for load in loads):
        wanted |= _COMPUTE | _HALVES | (_OUTPUTS if parallel else {})
    if any(load.weights and not load.weights_cached for load in loads):
        wanted |= _WEIGHTS
    names = list(wanted)
    low, high, start = (np.log([wanted[name][place] for name in names]) for place in range(3))

    def rates_of(logs: Floats) -> Rates:
        return Rates(**{name: _rounded(math.exp(value)) for name, value in zip(names, logs, strict=True)})

    def misses(logs: Floats) -> Floats:
        values = dict(zip(names, np.exp(logs).tolist(), strict=True))
        rates = Rates.model_construct(**values)
        return _logs(samples, loads, rates, peak, bandwidth, kernel_seconds)

    best: Any = min(
        (
            optimize.least_squares(misses, np.clip(begin, low, high), bounds=(low, high), loss="soft_l1", f_scale=_ODD)
            for begin in (start, start - 1.0, start + 0.5)
        ),
        key=lambda found: float(found.cost),
    )
    return rates_of(best.x)


def residuals(
    samples: Sequence[Sample], rates: Rates, *, peak: float, bandwidth: float, cache: int, kernel_seconds: float = 0.0
) -> Floats:
    """Return the logs of estimated over measured times."""
    loads = [load_of(sample, cache) for sample in samples]
    return _logs(samples, loads, rates, peak, bandwidth, kernel_seconds)


def _logs(
    samples: Sequence[Sample], loads: Sequence[Load], rates: Rates, peak: float, bandwidth: float, kernel: float
) -> Floats:
    estimated = [
        kernel + max(rates.compute_seconds(load, peak), rates.memory_seconds(load, bandwidth)) for load in loads
    ]
    return np.log(estimated) - np.log([max(sample.seconds, 1e-9) for sample in samples])


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")

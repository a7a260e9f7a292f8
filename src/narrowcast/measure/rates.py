"""From what probes took to the shares of the peaks that classes of operators reach."""

from __future__ import annotations

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

#: Parameters: the least, the most, and where the search begins.
_HALVES = {"rows_half": (1e-3, 1e3, 1.0), "columns_half": (1e-3, 1e3, 1.0), "depth_half": (1e-3, 1e3, 1.0)}
_OUTPUTS = {"outputs_half": (1e-3, 1e7, 1e4)}
_COMPUTE = {"compute": (1e-4, 1.0, 0.7)}
_MEMORY = {"fixed_us": (0.01, 50.0, 1.0), "bandwidth": (1e-3, 1.2, 0.7), "cached": (1e-3, 50.0, 1.0)}
_WEIGHTS = {"weights": (1e-2, 1.2, 0.8)}
#: Logs of ratios of times beyond this count less than their squares, so that one odd probe does not decide.
_ODD = 0.2
#: What one e-fold from where the search begins weighs: where probes do not tell, rates stay usual.
_PRIOR = 0.02
#: Places that the search begins at.
_STARTS = 8


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
    parallel: bool = False,
) -> dict[OperatorClass, Rates]:
    """Return the rates of every class that was probed.

    Args:
        samples: What the probes took.
        peak: FLOP/s in the probes' format.
        bandwidth: Bytes per second.
        cache: Bytes of the largest cache.
        parallel: Whether small products leave parts of the device idle (GPUs).
    """
    by_class: dict[OperatorClass, list[Sample]] = defaultdict(list)
    for sample in samples:
        by_class[sample.case.kind].append(sample)
    return {
        kind: fit_class(found, peak=peak, bandwidth=bandwidth, cache=cache, parallel=parallel)
        for kind, found in sorted(by_class.items())
    }


def fit_class(samples: Sequence[Sample], *, peak: float, bandwidth: float, cache: int, parallel: bool = False) -> Rates:
    """Return the rates that explain one class's samples best: least squares of the logs of ratios, odd ones damped."""
    loads = [load_of(sample, cache) for sample in samples]
    wanted = dict(_MEMORY)
    if any(load.flops for load in loads):
        wanted |= _COMPUTE | _HALVES | (_OUTPUTS if parallel else {})
    if any(load.weights and not load.weights_cached for load in loads):
        wanted |= _WEIGHTS
    names = list(wanted)
    low, high, start = (np.log([wanted[name][place] for name in names]) for place in range(3))
    measured = np.log([max(sample.seconds, 1e-9) for sample in samples])

    def misses(logs: Floats) -> Floats:
        rates = Rates.model_construct(**dict(zip(names, np.exp(logs).tolist(), strict=True)))
        return np.append(_logs(rates, loads, peak, bandwidth) - measured, _PRIOR * (logs - start))

    rng = np.random.default_rng(0)
    starts = [start, *(start + rng.normal(0.0, 1.0, len(names)) for _ in range(_STARTS - 1))]
    found: list[Any] = [
        optimize.least_squares(
            misses, np.clip(begin, low + 1e-3, high - 1e-3), bounds=(low, high), loss="soft_l1", f_scale=_ODD
        )
        for begin in starts
    ]
    best: Floats = min(found, key=lambda one: float(one.cost)).x
    return Rates(**{name: float(f"{value:.4g}") for name, value in zip(names, np.exp(best).tolist(), strict=True)})


def residuals(samples: Sequence[Sample], rates: Rates, *, peak: float, bandwidth: float, cache: int) -> Floats:
    """Return the logs of estimated over measured times."""
    loads = [load_of(sample, cache) for sample in samples]
    return _logs(rates, loads, peak, bandwidth) - np.log([sample.seconds for sample in samples])


def _logs(rates: Rates, loads: Sequence[Load], peak: float, bandwidth: float) -> Floats:
    return np.log([rates.seconds(load, peak, bandwidth) for load in loads])

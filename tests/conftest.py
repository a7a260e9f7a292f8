"""What every test shares: which runtimes are under test, and a few small models and data."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from narrowcast.artifacts.manifest import DataRecord, Manifest, MetricRecord, ModelRecord, Verdict
from narrowcast.data.dataset import Dataset
from narrowcast.errors import RuntimeMissingError
from narrowcast.measure.environment import environment
from narrowcast.recipes.plan import Plan
from narrowcast.recipes.recipe import Optimise, Recipe
from narrowcast.recipes.target import Target
from narrowcast.runtimes import Runtime, get_runtime, runtime_names

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell that runs a program in the background has it ignore Ctrl-C, and so would the programs that tests interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def runtime_version(name: str) -> str | None:
    """Return the version of a runtime, or None where it is not installed."""
    try:
        return get_runtime(name).version()
    except RuntimeMissingError:
        return None


def pytest_report_header() -> str:
    shown = [f"{name} {runtime_version(name) or 'NOT INSTALLED'}" for name in runtime_names()]
    return f"runtimes under test: {', '.join(shown)}"


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Name bytes that are no text by their argument: a stamp or a seed within would give each process other tests."""
    return argname if isinstance(val, bytes) and not (val.isascii() and val.decode("ascii").isprintable()) else None


@pytest.fixture(params=runtime_names())
def runtime(request: pytest.FixtureRequest) -> Runtime:
    """Each registered runtime; one that is not installed is a failure where CI is set, else a skip."""
    if runtime_version(request.param) is None:
        message = f"runtime {request.param} is not installed"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return get_runtime(request.param)


@pytest.fixture
def dataset_of() -> Callable[..., Dataset]:
    """From arrays by input name to a dataset over them."""

    def make(labels: Any = None, groups: Any = None, **arrays: np.ndarray) -> Dataset:
        size = len(next(iter(arrays.values())))
        return Dataset(
            "test", "0" * 64, size, lambda i: {name: array[i] for name, array in arrays.items()}, labels, groups
        )

    return make


@pytest.fixture
def manifest_of() -> Callable[..., Manifest]:
    """From any fields to a manifest that has the rest filled in."""

    def make(**fields: Any) -> Manifest:
        target = fields.pop("target", Target())
        known: dict[str, Any] = {
            "narrowcast": "0.1",
            "created": "2026-01-01T00:00:00+00:00",
            "model": ModelRecord(ref="onnx:net.onnx", sha256="0" * 64, bytes=10, random_weights=False),
            "data": DataRecord(ref="npz:d.npz", sha256="1" * 64, seed=0, calibration=4, search=3, report=3),
            "metric": MetricRecord(name="top1", unit="", higher_is_better=True),
            "target": target,
            "plan": Plan(recipe=Recipe(name="fp32", steps=(Optimise(),)), target=target),
            "versions": {},
            "files": {},
            "parity": 1e-3,
            "measurements": (),
            "environment": environment(),
            "verdict": Verdict(met=True, headline="Budget met."),
        }
        return Manifest(**known | fields)

    return make


@pytest.fixture(autouse=True)
def _stay_in_a_folder_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing that a test writes to the current folder may reach the checkout."""
    monkeypatch.chdir(tmp_path)

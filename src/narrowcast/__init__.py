"""One budget in, one proven low-precision model out.

>>> import narrowcast as nc
>>> result = nc.optimize(
...     "bundled:digits-cnn", data="bundled:digits", out="digits-int8", budget=nc.Budget.parse(max_drop="0.5pt")
... )  # doctest: +SKIP
>>> print(result)  # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from narrowcast._version import __version__

if TYPE_CHECKING:
    from narrowcast.artifacts.store import load_artifact
    from narrowcast.data.dataset import Dataset
    from narrowcast.errors import NarrowcastError, UserError
    from narrowcast.measure.verify import verify_artifact as verify
    from narrowcast.models.loaders import load_model
    from narrowcast.recipes.budget import Budget
    from narrowcast.recipes.target import Target
    from narrowcast.runtimes import get_runtime, runtime_names
    from narrowcast.search.bench import bench
    from narrowcast.search.optimize import Result, optimize

__all__ = [
    "Budget",
    "Dataset",
    "NarrowcastError",
    "Result",
    "Target",
    "UserError",
    "__version__",
    "bench",
    "get_runtime",
    "load_artifact",
    "load_model",
    "optimize",
    "runtime_names",
    "verify",
]

# Loaded on first use: a server that only runs artifacts must not import calibration code.
_HOMES = {
    "Budget": ("narrowcast.recipes.budget", "Budget"),
    "Dataset": ("narrowcast.data.dataset", "Dataset"),
    "NarrowcastError": ("narrowcast.errors", "NarrowcastError"),
    "Result": ("narrowcast.search.optimize", "Result"),
    "Target": ("narrowcast.recipes.target", "Target"),
    "UserError": ("narrowcast.errors", "UserError"),
    "bench": ("narrowcast.search.bench", "bench"),
    "get_runtime": ("narrowcast.runtimes", "get_runtime"),
    "load_artifact": ("narrowcast.artifacts.store", "load_artifact"),
    "load_model": ("narrowcast.models.loaders", "load_model"),
    "optimize": ("narrowcast.search.optimize", "optimize"),
    "runtime_names": ("narrowcast.runtimes", "runtime_names"),
    "verify": ("narrowcast.measure.verify", "verify_artifact"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'narrowcast' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted(__all__)

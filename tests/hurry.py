"""Measure for a moment only: for tests that look at no time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from narrowcast.measure import suite
from narrowcast.search import optimize, trial


def hurry(put: Callable[[Any, str, Any], None] = setattr) -> None:
    """Shorten what ``optimize`` measures, by ``put`` (which a test passes to have it undone)."""
    put(trial, "SEARCH_SECONDS", 0.2)
    put(optimize, "measure_pair", functools.partial(suite.measure_pair, seconds=0.4))
    put(suite, "BEST_BATCH_SECONDS", 0.1)
    put(suite, "throughput", functools.partial(suite.throughput, seconds=0.05, largest=2))

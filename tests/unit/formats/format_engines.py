"""encode, decode and cast by NumPy's loops, by compiled ones, and by torch's casts: they must agree to the bit."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from narrowcast.formats import codec, fast

ENGINES = ("portable", "compiled", "torch")  # numba and torch are dependencies of the tests: no way is skipped


@contextmanager
def running_on(name: str) -> Iterator[Any]:
    """Let the codecs go one way only; gives the engine whose loops run."""
    chosen = importlib.import_module(f"narrowcast.formats.{'portable' if name == 'torch' else name}")
    with pytest.MonkeyPatch.context() as patch, _nothing_kept():
        for module_name, module in list(sys.modules.items()):
            if module_name.startswith("narrowcast.formats.") and callable(vars(module).get("engine")):
                patch.setattr(module, "engine", lambda: chosen)
        if name != "torch":
            patch.setattr(fast, "encode_natively", lambda *_: False)
        yield chosen


@contextmanager
def _nothing_kept() -> Iterator[None]:
    """Forget which loops formats and rules lead to, before and after: they belong to an engine."""
    kept = (codec._encoding, codec._decoding, fast.Encoding.of, fast.Decoding.of)
    for answers in kept:
        answers.cache_clear()
    try:
        yield
    finally:
        for answers in kept:
            answers.cache_clear()


def _everywhere(call: Callable[..., Any]) -> Callable[..., Any]:
    def called(*arguments: Any, **choices: Any) -> Any:
        results = []
        for name in ENGINES:
            with running_on(name):
                results.append(call(*arguments, **choices))
        first = np.asarray(results[0])
        for name, result in zip(ENGINES[1:], results[1:], strict=True):
            other = np.asarray(result)
            assert (first.dtype, first.shape) == (other.dtype, other.shape)
            if first.tobytes() != other.tobytes():
                floating = first.dtype.kind == "f"  # where a NaN's payload may differ
                same = (first == other) & (np.signbit(first) == np.signbit(other)) if floating else first == other
                differ = np.flatnonzero(~(same | (first != first) & (other != other)))
                assert len(differ) == 0, f"{ENGINES[0]} and {name} differ at {differ[:5]}"
        return results[0]

    return called


encode = _everywhere(codec.encode)
decode = _everywhere(codec.decode)
cast = _everywhere(codec.cast)

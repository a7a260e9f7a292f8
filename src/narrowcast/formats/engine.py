"""Which inner loops run: compiled ones where numba is installed, NumPy's elsewhere. The results are the same."""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from typing import Protocol

import numpy as np

from narrowcast.formats.kinds import Format
from narrowcast.formats.portable import ErrorSums, SpecialCodes, Values

__all__ = ["Engine", "engine"]


class Engine(Protocol):
    """The inner loops; ``portable`` says what each one does."""

    NAME: str
    COMPILED: bool
    CHUNK: int

    def codes_by_half(self, x: np.ndarray, table: np.ndarray, out: np.ndarray) -> None: ...
    def values_by_half(self, x: np.ndarray, table: np.ndarray, out: np.ndarray) -> None: ...
    def codes_above(self, x: np.ndarray, edges: np.ndarray, out: np.ndarray) -> None: ...
    def absmax(self, rows: np.ndarray) -> np.ndarray: ...
    def codes_of_scaled(self, rows: np.ndarray, scales: np.ndarray, table: np.ndarray, out: np.ndarray) -> None: ...
    def codes_above_scaled(self, rows: np.ndarray, scales: np.ndarray, edges: np.ndarray, out: np.ndarray) -> None: ...
    def rounded_steps(
        self,
        rows: np.ndarray,
        scales: np.ndarray,
        zero_points: np.ndarray,
        lowest: int,
        highest: int,
        mask: int,
        out: np.ndarray,
    ) -> None: ...
    def decoded(self, codes: np.ndarray, values: Values, out: np.ndarray) -> None: ...
    def decoded_nibbles(self, packed: np.ndarray, scales: np.ndarray, values: Values, out: np.ndarray) -> None: ...
    def rounded_to_nearest(self, x: np.ndarray, format: Format, special: SpecialCodes, out: np.ndarray) -> None: ...
    def narrowed_to_odd(self, x: np.ndarray) -> np.ndarray: ...
    def converted(self, x: np.ndarray, out: np.ndarray) -> None: ...
    def quieted(self, codes: np.ndarray, format: Format, out: np.ndarray) -> None: ...
    def decoded_floats(self, codes: np.ndarray, format: Format, out: np.ndarray) -> bool: ...
    def counted(self, codes: np.ndarray, bins: int) -> np.ndarray: ...
    def errors(
        self, x: np.ndarray, y: np.ndarray, low: np.ndarray, high: np.ndarray, smallest: np.ndarray
    ) -> ErrorSums: ...


@cache
def engine() -> Engine:
    """Return the loops to run."""
    name = "compiled" if importlib.util.find_spec("numba") else "portable"
    return importlib.import_module(f"narrowcast.formats.{name}")  # type: ignore[return-value]

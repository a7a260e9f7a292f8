"""When requests are due: arrival processes of an open loop, each from a seed.

Sources: Poisson and gamma renewal processes, and time-varying rates by inversion of the integrated rate: A. M. Law, "Simulation
Modeling and Analysis", 5th ed., section 8.6.
"""

from __future__ import annotations

import json
import math
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from narrowcast.errors import DataError, UserError, choices

__all__ = ["Arrivals", "Constant", "Gamma", "Poisson", "Ramp", "Replay", "read_arrivals"]

Floats = NDArray[np.float64]


class Arrivals(ABC):
    """A process that says when requests are due."""

    @abstractmethod
    def times(self, seconds: float, rng: np.random.Generator) -> Floats:
        """Return when requests are due within so many seconds, in order, in seconds after the start."""


@dataclass(frozen=True)
class Constant(Arrivals):
    """One request every ``1 / rate`` seconds."""

    rate: float

    def times(self, seconds: float, rng: np.random.Generator) -> Floats:
        return np.arange(math.ceil(self.rate * seconds - 1e-9)) / self.rate

    def __str__(self) -> str:
        return f"constant, {self.rate:g}/s"


@dataclass(frozen=True)
class Gamma(Arrivals):
    """Gamma-distributed times between requests; with a coefficient of variation above 1 they come in bursts.

    Attributes:
        rate: Requests per second in the mean.
        cv: Standard deviation of the times between requests, as a multiple of their mean; 1 is the Poisson process.
    """

    rate: float
    cv: float

    def times(self, seconds: float, rng: np.random.Generator) -> Floats:
        shape = 1 / self.cv**2
        return _until(seconds, self.rate, lambda count: rng.gamma(shape, 1 / (self.rate * shape), count))

    def __str__(self) -> str:
        return f"gamma with a coefficient of variation of {self.cv:g}, {self.rate:g}/s"


@dataclass(frozen=True)
class Poisson(Arrivals):
    """Requests that know nothing of each other."""

    rate: float

    def times(self, seconds: float, rng: np.random.Generator) -> Floats:
        return _until(seconds, self.rate, lambda count: rng.exponential(1 / self.rate, count))

    def __str__(self) -> str:
        return f"Poisson, {self.rate:g}/s"


@dataclass(frozen=True)
class Ramp(Arrivals):
    """A Poisson process whose rate goes from one value to another in a straight line."""

    start: float
    stop: float

    def times(self, seconds: float, rng: np.random.Generator) -> Floats:
        slope = (self.stop - self.start) / seconds
        total = (self.start + self.stop) / 2 * seconds
        unit = _until(total, 1.0, lambda count: rng.exponential(1.0, count))
        # The integrated rate is start·t + slope·t²/2; this form of its inverse divides by no difference.
        return 2 * unit / (self.start + np.sqrt(np.maximum(0.0, self.start**2 + 2 * slope * unit)))

    def __str__(self) -> str:
        return f"Poisson, from {self.start:g}/s to {self.stop:g}/s"


@dataclass(frozen=True)
class Replay(Arrivals):
    """Times that were recorded.

    Attributes:
        name: Where they come from.
        recorded: Seconds, in order, the first at 0.
    """

    name: str
    recorded: tuple[float, ...]

    def times(self, seconds: float, rng: np.random.Generator) -> Floats:
        return np.array([time for time in self.recorded if time < seconds])

    def __str__(self) -> str:
        return f"replayed from {self.name}"


def _until(end: float, rate: float, gaps: Callable[[int], Floats]) -> Floats:
    """Return the running sums of gaps that lie before the end."""
    parts: list[Floats] = []
    last = 0.0
    while last < end:
        count = int((end - last) * rate + 4 * math.sqrt((end - last) * rate)) + 16
        part = last + np.cumsum(gaps(count))
        parts.append(part)
        last = float(part[-1])
    whole = np.concatenate(parts) if parts else np.empty(0)
    return whole[whole < end]


def read_arrivals(text: str, rate: float | None) -> Arrivals:
    """Return the process that is asked for.

    Args:
        text: ``poisson``, ``constant``, ``gamma:CV``, ``ramp:FROM:TO`` or ``replay:FILE``.
        rate: Requests per second; only ramps and replays have their own.

    Raises:
        UserError: There is no such process, or it and the rate contradict each other.
        DataError: A file of times cannot be read.
    """
    kind, _, rest = text.partition(":")
    own = {"ramp": lambda: _ramp(text, rest), "replay": lambda: _replay(Path(rest))}
    if kind in own:
        if rate is not None:
            raise UserError(f"--rate {rate:g} and --arrivals {text} contradict each other", allowed="one of them")
        return own[kind]()
    if kind not in ("poisson", "constant", "gamma") or (rest and kind != "gamma"):
        raise UserError(
            f"arrivals {text!r} are unknown",
            allowed=choices(kind, ("poisson", "constant", "gamma:CV", "ramp:FROM:TO", "replay:FILE")),
        )
    if rate is None:
        raise UserError("an open loop needs a rate", next_step="say it: --rate 100; or close the loop: --concurrency 8")
    if kind == "gamma":
        return Gamma(rate, _positive(text, rest))
    return Constant(rate) if kind == "constant" else Poisson(rate)


def _ramp(text: str, rest: str) -> Ramp:
    start, _, stop = rest.partition(":")
    found = Ramp(_positive(text, start, zero=True), _positive(text, stop, zero=True))
    if found.start == found.stop == 0:
        raise UserError(f"arrivals {text!r} never come", allowed="ramp:FROM:TO with one of them above 0")
    return found


def _positive(text: str, number: str, *, zero: bool = False) -> float:
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not (0 < value < math.inf or (zero and value == 0)):
        raise UserError(
            f"arrivals {text!r} cannot be read at {number!r}", allowed="gamma:CV or ramp:FROM:TO, in numbers"
        )
    return value


def _replay(path: Path) -> Replay:
    """Return times from a text file with one a line (the first column of CSV), or the records of an earlier run."""
    try:
        if path.suffix == ".npz":
            with path.open("rb") as whole, np.load(whole, allow_pickle=False) as file:
                times = np.asarray(file["intended"], np.float64)
        elif path.suffix == ".jsonl":
            with path.open(encoding="utf-8") as lines:
                times = np.array([float(json.loads(line)["intended"]) for line in lines if line.strip()])
        else:
            lines = path.read_text(encoding="utf-8").splitlines()
            if lines and lines[0].split(",")[0].strip() == "intended":
                del lines[0]
            times = np.array([float(line.split(",")[0]) for line in lines if line.strip() and line[0] != "#"])
    except OSError as error:
        raise DataError(f"times {path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"times {path} cannot be read",
            allowed="a line of seconds for each request, or the records of an earlier run",
        ) from error
    if not len(times) or not np.isfinite(times).all():
        raise DataError(f"{path} has no times, or one that is no number")
    times = np.sort(times)
    return Replay(path.name, tuple((times - times[0]).tolist()))

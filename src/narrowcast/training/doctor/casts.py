"""Casts that saturate: they hide an overflow, since what comes out is finite."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from narrowcast.training.doctor.paths import Paths, Place, wrapped
from narrowcast.training.doctor.sentinel import Fault, Sentinel, dtype_name, range_of
from narrowcast.training.doctor.values import Range

__all__ = ["CastCounter", "Found", "Probe", "Probed"]

_EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
_NARROW = (*reversed(_EIGHT_BITS), torch.float16, torch.bfloat16)
#: Formats by the magnitude where they end; e5m2fnuz ends where e5m2 does, which is the usual one.
_ENDS = {torch.finfo(dtype).max: dtype for dtype in (*_NARROW, torch.float32, torch.float64)}
#: Ends that a clamp has for their format's sake; masks are clamped to those of wider ones.
_CLAMPED = {torch.finfo(dtype).max for dtype in _NARROW}
#: Share of the numbers beyond the limit, and how far beyond, from which a cast counts as saturating.
_SHARE, _BEYOND = 1e-3, 1.125


@dataclass(frozen=True)
class Found:
    """A cast that saturated: where, to which limit, how many of how many numbers, and the largest of them."""

    place: Place
    operator: str
    limit: float
    beyond: int
    infinite: int
    numbers: int
    largest: float

    @property
    def saturates(self) -> bool:
        """Whether it is more than rounding at the limit."""
        return self.infinite > 0 or (self.beyond > _SHARE * self.numbers and self.largest > _BEYOND * self.limit)

    @property
    def format(self) -> str:
        """The format that ends at the limit."""
        return dtype_name(_ENDS[self.limit]).removeprefix("float8_")


class CastCounter(TorchDispatchMode):
    """Counts what casts to 8 bits, and clamps to the limits of narrow formats, cut off; it waits for no device.

    Args:
        paths: Where operators run.
    """

    def __init__(self, paths: Paths) -> None:
        super().__init__()
        self._paths = paths
        self._counts: dict[tuple[Place, str, float], list[Tensor]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return (
            False  # nothing is compiled while it counts, and what keeps Dynamo away costs as much as the counter itself
        )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if types and wrapped(types):
            return NotImplemented  # a subclass of Tensor goes on with plain tensors, which are seen
        limit = _limit(func, args, kwargs)
        if limit is None:
            self._paths.follow()
        else:
            key = (self._paths.here()._replace(towards="", node=""), str(func.overloadpacket), limit)
            self._counts.setdefault(key, []).append(_count(args[0], limit))
        return func(*args, **kwargs)

    def take(self) -> tuple[list[tuple[tuple[Place, str, float], int]], Tensor | None]:
        """Return places and how many rows each has, and the rows ``[beyond, infinite, numbers, largest]`` on the device."""
        keys = [(key, len(rows)) for key, rows in self._counts.items()]
        rows = [row for rows in self._counts.values() for row in rows]
        self._counts = {}
        return keys, torch.stack(rows) if rows else None

    @staticmethod
    def found(keys: list[tuple[tuple[Place, str, float], int]], rows: list[list[float]]) -> list[Found]:
        """Return the casts, from what :meth:`take` returned and its rows' numbers."""
        casts: list[Found] = []
        start = 0
        for (place, operator, limit), count in keys:
            own = rows[start : start + count]
            start += count
            beyond, infinite, numbers = (int(sum(row[column] for row in own)) for column in range(3))
            casts.append(
                Found(place, operator, limit, beyond, infinite, numbers, max((row[3] for row in own), default=0.0))
            )
        return casts


def _limit(func: Any, args: Any, kwargs: Any) -> float | None:
    """Return the magnitude at which an operator saturates; None if it does not, or not at a format's limit."""
    name = func.overloadpacket.__name__
    if name == "_to_copy":
        dtype = kwargs.get("dtype")
        return torch.finfo(dtype).max if dtype in _EIGHT_BITS and args[0].is_floating_point() else None
    if name in ("clamp", "clamp_", "hardtanh", "clamp_max", "clamp_max_", "clip"):
        ends = [one for one in (*args[1:], *kwargs.values()) if isinstance(one, int | float)]
        return next((float(one) for one in ends if float(one) in _CLAMPED), None)
    if name in ("nan_to_num", "nan_to_num_"):
        return torch.finfo(args[0].dtype).max
    return None


@torch.no_grad()
def _count(numbers: Tensor, limit: float) -> Tensor:
    sizes = numbers.detach().abs()
    finite = torch.where(sizes.isfinite(), sizes, 0)
    return torch.stack(
        [
            (finite > limit).sum().double(),
            sizes.isinf().sum().double(),
            torch.full((), numbers.numel(), dtype=torch.float64, device=numbers.device),
            finite.max().double(),
        ]
    )


@dataclass(frozen=True)
class Probed:
    """The first saturating cast of a replay.

    Attributes:
        call: How many casts ran there before.
        inputs: What went in.
        snr: Signal to noise of the cast as it is, in dB.
        fresh_snr: The same with the largest power of two that overflows nothing.
        fresh: That power of two, relative to the scale in use.
        origin: Where infinities among what went in come from, if that was seen.
    """

    call: int
    inputs: Range
    snr: float
    fresh_snr: float
    fresh: float
    origin: Fault | None


class Probe(TorchDispatchMode):
    """Looks closely at the casts at one place of a replay, and tries the cast with a fresh scale.

    Args:
        paths: Where operators run.
        found: The cast to look at.
        sentinel: What follows infinities in the same replay, entered before.
    """

    def __init__(self, paths: Paths, found: Found, sentinel: Sentinel) -> None:
        super().__init__()
        self._sentinel = sentinel
        self.probed: Probed | None = None
        self._paths = paths
        self._wanted = found
        self._calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if wrapped(types):
            return NotImplemented
        place = self._paths.here()._replace(towards="", node="")
        wanted = self._wanted
        at = place == wanted.place and str(func.overloadpacket) == wanted.operator
        if at and self.probed is None and _limit(func, args, kwargs) == wanted.limit:
            numbers = args[0].detach().double()
            if bool((numbers.abs() > wanted.limit).any()):
                origin = self._sentinel.origin([args[0]])
                self.probed = _probed(self._calls, args[0], numbers, wanted, origin)
            self._calls += 1
        return func(*args, **kwargs)


def _probed(call: int, given: Tensor, numbers: Tensor, found: Found, origin: Fault | None) -> Probed:
    dtype = _ENDS[found.limit]
    finite = numbers[numbers.isfinite()]
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    fresh = 2.0 ** math.floor(math.log2(found.limit / largest)) if largest else 1.0

    def noise(scale: float) -> float:
        cast = (finite * scale).clamp(-found.limit, found.limit).float().to(dtype).double() / scale
        error = float((cast - finite).square().sum())  # 0 without finite numbers
        return 10 * math.log10(float(finite.square().sum()) / error) if error else math.inf

    return Probed(call, range_of("input 0", given), noise(1.0), noise(fresh), fresh, origin)

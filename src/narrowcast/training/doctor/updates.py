"""Updates that are too small for the format of the weights, seen and explained."""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from narrowcast import formats as nf
from narrowcast.training.doctor.histograms import spacing
from narrowcast.training.doctor.replay import local
from narrowcast.training.doctor.sentinel import range_of
from narrowcast.training.doctor.values import Cause, Part, Remedy

__all__ = ["explain_stagnation", "intended_update", "ratios", "thinned"]

_NUMBERS = 1 << 16  # of a parameter that are looked at
_REPEATS = 1024  # updates that a remedy has to carry: sums in bf16 stop at 256 times what is added
_TRIED = 1 << 12  # numbers that carry them
_MENDED = 0.5  # share of their sum that has to arrive
_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def thinned(tensor: Tensor, limit: int = _NUMBERS) -> Tensor:
    """Return at most ``limit`` numbers, evenly spaced in the order of a tensor's indices."""
    flat = tensor.detach().reshape(-1)
    return flat[:: spacing(flat.numel(), limit)]


@torch.no_grad()
def ratios(updates: Tensor, weights: Tensor) -> Tensor:
    """Return ``|update| / 2**floor(log2(|weight|))``, float32; 1 for an update of a weight that is zero."""
    _, exponents = torch.frexp(weights.float())
    found = torch.ldexp(updates.float().abs(), 1 - exponents)
    return torch.where(weights == 0, (updates != 0).float(), found)


@torch.no_grad()
def intended_update(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> Tensor:
    """Return what the optimizer's next step would add to a parameter with its gradient, computed in FP32.

    Neither the optimizer nor the parameter changes. Of a sharded parameter it is what is added to this rank's part, and no
    other rank is asked; an optimizer that takes norms of whole tensors would add something else.
    """
    assert parameter.grad is not None
    group = next(one for one in optimizer.param_groups if any(other is parameter for other in one["params"]))
    clone = nn.Parameter(local(parameter.detach()).float().clone())
    grad = parameter.grad.detach()
    clone.grad = (grad if grad.is_sparse else local(grad)).float().clone()
    shadow: Any = copy.copy(optimizer)
    shadow.param_groups = [{**group, "params": [clone]}]
    shadow.state = defaultdict(dict, {clone: _in_fp32(optimizer.state.get(parameter, {}))})
    before = clone.detach().clone()
    type(optimizer).step(shadow)  # the class's own: a schedule has wrapped the instance's
    return clone.detach() - before


def _in_fp32(state: dict[str, Any]) -> dict[str, Any]:
    def one(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return copy.copy(value)
        value = local(value)
        return value.detach().float().clone() if value.is_floating_point() else value.detach().clone()

    return {name: one(value) for name, value in state.items()}


@torch.no_grad()
def explain_stagnation(
    optimizer: torch.optim.Optimizer,
    layer: str,
    name: str,
    parameter: nn.Parameter,
    *,
    step: int,
    rank: int,
    stuck: float,
) -> Cause:
    """Return why a parameter stays where it is, with the ways to round or to keep it tried on its own updates.

    Args:
        optimizer: What moves it; it stays as it is.
        layer: The parameter's module.
        name: The parameter's own name.
        parameter: With its gradient; of a sharded one, this rank's part is looked at.
        step: Updates done.
        rank: Number of this process.
        stuck: Share of its numbers that have a gradient and did not move.
    """
    format = _NAMES[parameter.dtype]
    held = local(parameter.detach())
    weights = thinned(held).float()
    updates = thinned(intended_update(optimizer, parameter))
    moving = updates != 0
    small = ratios(updates, weights)[moving] <= torch.finfo(parameter.dtype).eps / 2
    share = float(small.float().mean()) if small.numel() else 0.0
    counted = f"a sample of {weights.numel():,}" if weights.numel() < parameter.numel() else "the"
    seen = (
        f"{stuck:.1%} of {counted} numbers of {name!r} in {format} did not move though they have a gradient: in FP32, "
        f"{share:.1%} of the updates are at most half a unit in the last place of their weight (2^-8 of its binade in bf16)"
    )
    return Cause(
        step=step,
        rank=rank,
        part=Part.UPDATE,
        layer=layer,
        operator=f"{type(optimizer).__name__}.step",
        kind="stagnant",
        inputs=(range_of(name, held), range_of("update in FP32", updates)),
        seen=seen,
        remedies=_tried(weights, updates, format),
    )


def _tried(weights: Tensor, updates: Tensor, format: str) -> tuple[Remedy, ...]:
    """Return the ways to round or to keep weights, with what arrives of many updates in a row."""
    weights, updates = thinned(weights, _TRIED), thinned(updates, _TRIED)
    ways = (
        ("stochastic rounding of the weights (bf16-true's own update)", _stochastic),
        ("Kahan sums of the updates (update='kahan')", _kahan),
        ("FP32 weights (bf16-mixed)", _master),
        ("round-to-nearest updates, as now", _plain),
    )
    wanted = float((updates.abs() * _REPEATS).sum()) or 1.0
    found: list[Remedy] = []
    for setting, way in ways:
        moved = float(((way(weights, updates, format) - weights) * updates.sign()).sum()) / wanted
        evidence = f"{_REPEATS} such updates in a row moved the weights by {moved:.1%} of their sum"
        found.append(Remedy(kind="rounding", setting=setting, mended=moved > _MENDED, evidence=evidence))
    return tuple(sorted(found, key=lambda one: not one.mended))


def _stochastic(weights: Tensor, updates: Tensor, format: str) -> Tensor:
    for seed in range(_REPEATS):
        weights = _cast(weights + updates, format, rounding="stochastic", seed=seed)
    return weights


def _kahan(weights: Tensor, updates: Tensor, format: str) -> Tensor:
    """Return the weights with what is kept beside them and will be added when it is large enough."""
    rest = torch.zeros_like(weights)
    for _ in range(_REPEATS):
        wanted = updates + rest
        moved = _cast(weights + wanted, format)
        rest = _cast(wanted - (moved - weights), format)
        weights = moved
    return weights + rest


def _master(weights: Tensor, updates: Tensor, format: str) -> Tensor:
    for _ in range(_REPEATS):
        weights = weights + updates
    return weights


def _plain(weights: Tensor, updates: Tensor, format: str) -> Tensor:
    for _ in range(_REPEATS):
        weights = _cast(weights + updates, format)
    return weights


def _cast(numbers: Tensor, format: str, **rules: Any) -> Tensor:
    return torch.as_tensor(nf.cast(numbers.cpu(), format, **rules)).to(numbers)

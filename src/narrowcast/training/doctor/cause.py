"""Where a step broke first: which rank, pass, layer and operator, from what numbers, and what mends it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path

from narrowcast.training.doctor import replay
from narrowcast.training.doctor.exchange import gather, ranks
from narrowcast.training.doctor.paths import Paths, bare, layer_names
from narrowcast.training.doctor.remedies import (
    drop_samples,
    lost_epsilon,
    raise_scale,
    trials,
    try_all,
)
from narrowcast.training.doctor.replay import Scene
from narrowcast.training.doctor.sentinel import Fault, Sentinel, range_of
from narrowcast.training.doctor.values import Cause, Part, Range
from narrowcast.training.policies import Precision
from narrowcast.training.policies import precision as policy_of

__all__ = ["agreed_cause", "explain", "explain_vanishing", "first_cause", "sharded"]

_UNKNOWN = "unknown"
_SHORT = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "float64": "fp64"}


def first_cause(
    model: nn.Module,
    loss: Callable[[Any, Any], Any],
    batch: tuple[Any, Any],
    precision: str | Precision = "fp32",
    *,
    scale: float = 1.0,
    random: Mapping[str, Any] | None = None,
    step: int = 0,
    rank: int = 0,
) -> Cause | None:
    """Return where a step's loss or gradients stop being finite, with remedies tried; None if the replay is sound.

    Model, gradients, buffers and random states are as before afterwards.

    Args:
        model: As it is before the update.
        loss: From outputs and targets to a mean, or to a :class:`narrowcast.training.Loss`.
        batch: Inputs and targets; inputs are a tensor, a tuple or a dict.
        precision: A policy or its name.
        scale: What the loss was multiplied by.
        random: Random states at the start of the step, see :mod:`narrowcast.training.random_state`.
        step: For the answer.
        rank: For the answer.
    """
    return explain(Scene(model, loss, batch, policy_of(precision), scale, random, step, rank))


def explain(scene: Scene, *, remedies: bool = True) -> Cause | None:
    """Return where a scene breaks; see :func:`first_cause`.

    Args:
        scene: The step.
        remedies: Whether to try what may mend it.
    """
    try:
        return _poisoned(scene) or _data(scene, remedies) or _replayed(scene, remedies)
    except torch.OutOfMemoryError:  # gradients are kept aside, and ranges are counted in copies
        return _unseen(scene, (), "the replay did not fit the device's memory beside the run")


def _replayed(scene: Scene, remedies: bool) -> Cause | None:
    paths = Paths(scene.model)
    sentinel = Sentinel(paths)
    outcome = replay.run(scene, paths.following(), sentinel)
    if outcome.finite:
        return None
    loss_broke = not bool(torch.isfinite(outcome.loss_tensor).all())
    fault = sentinel.origin([outcome.loss_tensor] if loss_broke else outcome.broken_tensors)
    if fault is None and sentinel.faults:
        fault = sentinel.faults[0]
    if fault is None:
        return _unseen(
            scene, outcome.broken, "no operator that PyTorch dispatches gave the first number that is not finite"
        )
    return _cause(scene, fault, _sentence(fault), trials(scene, fault) if remedies else iter(()))


def explain_vanishing(scene: Scene) -> Cause | None:
    """Return where a scene's gradients become zero, all of them; None if some do not."""
    paths = Paths(scene.model)
    sentinel = Sentinel(paths, zeros=True)
    outcome = replay.run(scene, paths.following(), sentinel)
    if outcome.nonzero or not sentinel.faults:
        return None
    fault = sentinel.faults[0]
    given = max((_size(one) for one in fault.inputs[:-1]), default=0.0)
    kind = _SHORT.get(fault.result.dtype, fault.result.dtype)
    smallest = torch.finfo(fault.dtype).smallest_normal * torch.finfo(fault.dtype).eps
    seen = (
        f"{fault.operator} in {fault.place.node} made all {_count(fault.result)} numbers of a gradient zero: what came in "
        f"reaches {given:.3g} at a loss scale of {scene.scale:g}, and half of {kind}'s smallest number is {smallest / 2:.3g}; "
        "no parameter gets a gradient"
    )
    return _cause(scene, fault, seen, iter((raise_scale(scene),)), layer=fault.place.towards)


def agreed_cause(scene: Scene) -> Cause | None:
    """Return the cause of the rank where it began, the same on every rank; every rank has to call it.

    A forward pass breaks on its own rank; gradients of sharded weights bring what broke on one rank to all, so a rank that saw
    where it came from goes before one that did not. Remedies are tried on that rank alone, so for models whose parameters
    are sharded none is.
    """
    if ranks() == 1:
        return explain(scene)
    own = explain(scene, remedies=False)
    texts = gather("" if own is None else own.model_dump_json(), scene.device)
    causes = [Cause.model_validate_json(text) for text in texts if text]
    if not causes:
        return None
    first = min(causes, key=lambda one: (one.operator == _UNKNOWN, one.part is Part.BACKWARD, one.rank)).rank
    tried = texts[first]
    if scene.rank == first and not sharded(scene.model):
        found = explain(scene)
        tried = tried if found is None else found.model_dump_json()
    return Cause.model_validate_json(gather(tried, scene.device)[first])


def sharded(model: nn.Module) -> bool:
    """Return whether a model's parameters are spread over ranks, so that no rank can run it alone."""
    from torch.distributed.tensor import DTensor

    return any(isinstance(one, DTensor) for one in model.parameters())


def _poisoned(scene: Scene) -> Cause | None:
    """Return the cause if the weights themselves were not finite before the step."""
    names = layer_names(scene.model)
    for part in bare(scene.model).modules():
        for name, one in part.named_parameters(recurse=False):
            kept = replay.local(one.detach())
            if not bool(kept.isfinite().all()):
                found = range_of(name, kept)
                return Cause(
                    step=scene.step,
                    rank=scene.rank,
                    part=Part.UPDATE,
                    layer=names[id(part)],
                    operator="parameters",
                    kind="nan" if found.nan else "inf",
                    inputs=(found,),
                    seen=f"parameter {name!r} held {found.infinite} infinities and {found.nan} NaN before the step began: "
                    "an earlier update wrote them",
                )
    return None


def _data(scene: Scene, remedies: bool) -> Cause | None:
    """Return the cause if inputs or targets are not finite."""
    for side, values in zip(("inputs", "targets"), scene.batch, strict=True):
        for path, leaf in tree_flatten_with_path(values)[0]:
            if not isinstance(leaf, Tensor) or not leaf.is_floating_point() or bool(leaf.isfinite().all()):
                continue
            found = range_of(f"{side}{keystr(path)}", leaf)
            size = leaf.shape[0] if leaf.dim() else 1
            rows = leaf.isfinite().reshape(size, -1).all(1)
            samples = tuple(int(row) for row in (~rows).nonzero()[:, 0])
            which = ", ".join(map(str, samples[:8])) + (" ..." if len(samples) > 8 else "")
            tried = try_all(iter((drop_samples(scene, samples, size),))) if remedies and len(samples) < size else ()
            return Cause(
                step=scene.step,
                rank=scene.rank,
                part=Part.FORWARD,
                layer="data",
                operator="data",
                kind="nan" if found.nan else "inf",
                inputs=(found,),
                seen=f"{found.name} of the batch hold {found.nan} NaN and {found.infinite} infinities, in sample {which}",
                samples=samples,
                remedies=tried,
            )
    return None


def _unseen(scene: Scene, broken: tuple[str, ...], why: str) -> Cause:
    return Cause(
        step=scene.step,
        rank=scene.rank,
        part=Part.BACKWARD if broken else Part.FORWARD,
        layer=broken[0].rpartition(".")[0] if broken else "",
        operator=_UNKNOWN,
        kind="nan",
        seen=why + (f"; the gradient of {broken[0]} is the first that holds some" if broken else ""),
    )


def _cause(scene: Scene, fault: Fault, seen: str, found: Any, layer: str | None = None) -> Cause:
    return Cause(
        step=scene.step,
        rank=scene.rank,
        part=fault.place.part,
        layer=fault.place.layer if layer is None else layer,
        operator=fault.operator,
        call=fault.call,
        kind=fault.kind,
        inputs=fault.inputs,
        seen=seen,
        remedies=try_all(found),
    )


def _sentence(fault: Fault) -> str:
    """Say what an operator was given and what it made of it."""
    result, kind = fault.result, _SHORT.get(fault.result.dtype, fault.result.dtype)
    what = f"{result.infinite} infinities" if fault.kind == "inf" else f"{result.nan} NaN"
    node = f" in {fault.place.node}" if fault.place.node else ""
    text = f"{fault.operator}{node} gave {what} among {_count(result)} numbers of {kind}"
    inputs = [one for one in fault.inputs[:-1] if one.low is not None]
    if inputs:
        text += "; its inputs lie in " + ", ".join(f"[{one.low:.4g}, {one.high:.4g}]" for one in inputs)
    if fault.kind == "inf" and fault.overflows and fault.wide:
        text += f", and float64 gives up to {fault.wide:.4g}, beyond the {torch.finfo(fault.dtype).max:.5g} of {kind}"
    elif fault.kind == "inf" and fault.wide is None:
        text += "; it does not run in float64, so whether a wider format would hold the result is not known"
    lost = lost_epsilon(fault)
    if lost:
        text += f"; the epsilon {lost:.0e} is zero in {kind}"
    elif any(one.zeros for one in inputs) and not fault.overflows:
        text += f"; {sum(one.zeros for one in inputs)} of the inputs are zero"
    return text


def _size(found: Range) -> float:
    return max((abs(end) for end in (found.low, found.high) if end is not None), default=0.0)


def _count(found: Range) -> int:
    count = 1
    for length in found.shape:
        count *= length
    return count

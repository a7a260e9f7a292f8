"""Where a step broke first: which rank, pass, layer and operator, from what numbers, and what mends it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path

from narrowcast.training.doctor import replay
from narrowcast.training.doctor.exchange import gather
from narrowcast.training.doctor.paths import Paths, bare, layer_names
from narrowcast.training.doctor.remedies import Trial, lost_epsilon, raise_scale, replace_samples, trials, try_all
from narrowcast.training.doctor.replay import Scene
from narrowcast.training.doctor.sentinel import Fault, Sentinel, range_of
from narrowcast.training.doctor.values import Cause, Part, Range, Remedy
from narrowcast.training.policies import Precision
from narrowcast.training.policies import precision as policy_of

__all__ = ["agreed", "agreed_cause", "explain_vanishing", "first_cause"]

_UNKNOWN = "unknown"
_NO_ROOM = "the replay did not fit the device's memory beside the run"
_SHORT = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "float64": "fp64"}


class _Finding(BaseModel):
    """A cause before remedies were tried, with what it takes to try them, as one rank tells it to the others.

    Attributes:
        cause: The cause.
        fault: The operator; None where none was seen.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    cause: Cause
    fault: Fault | None = None


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

    Model, gradients, buffers and random states are as before afterwards. Of a model whose parameters are spread over ranks
    every rank has to ask, and all get the same answer.

    Args:
        model: As it is before the update.
        loss: From outputs and targets to a mean, or to a :class:`narrowcast.training.Loss`.
        batch: Inputs and targets; inputs are a tensor, a tuple or a dict.
        precision: A policy or its name.
        scale: What the loss was multiplied by.
        random: Random states at the start of the step, see :mod:`narrowcast.training.random_state`.
        step: For the answer.
        rank: For the answer; the number of this process.
    """
    scene = Scene(model, loss, batch, policy_of(precision), scale, random, step, rank)
    if scene.together:
        return agreed_cause(scene)
    found = _find(scene)
    return None if found is None else _with_remedies(found, try_all(_fitting(scene, found)))


def agreed_cause(scene: Scene) -> Cause | None:
    """Return the cause of the rank where it began, the same on every rank; every rank has to call it.

    A forward pass breaks on its own rank; gradients of sharded weights bring what broke on one rank to all, so a rank that saw
    where it came from goes before one that did not. Remedies are tried on that rank alone, or on all of them where no rank can
    run the model by itself: there one has mended it only if every rank's numbers are finite.
    """
    return _agreed(scene, _find(scene), _fitting)


def explain_vanishing(scene: Scene, names: Collection[str] = ()) -> Cause | None:
    """Return where the gradients of some parameters become zero, all of them; None if some do not.

    Where the scene runs on all ranks together every one has to call it, and all get the same answer.

    Args:
        scene: The step.
        names: The parameters; all unless given.
    """

    def raised(scene: Scene, found: _Finding) -> Iterator[Trial]:
        yield raise_scale(scene, names)

    found = _find_zeros(scene, names)
    if scene.together:
        return _agreed(scene, found, raised)
    return None if found is None else _with_remedies(found, try_all(raised(scene, found)))


def agreed(cause: Cause | None, device: torch.device) -> Cause | None:
    """Return the first rank's cause of those that found one; every rank has to call it."""
    texts = gather("" if cause is None else cause.model_dump_json(), device)
    return next((Cause.model_validate_json(text) for text in texts if text), None)


def _agreed(scene: Scene, own: _Finding | None, fitting: Callable[[Scene, _Finding], Iterator[Trial]]) -> Cause | None:
    texts = gather("" if own is None else own.model_dump_json(), scene.device)
    found = [_Finding.model_validate_json(text) for text in texts if text]
    if not found:
        return None
    causes = [one.cause for one in found]
    number = min(
        range(len(found)), key=lambda one: (causes[one].operator == _UNKNOWN, causes[one].part is Part.BACKWARD)
    )
    first = found[number]
    here = scene.rank == first.cause.rank
    cause = _with_remedies(first, try_all(fitting(scene, first)) if here or scene.together else ())
    return agreed(cause if here else None, scene.device)


def _with_remedies(found: _Finding, remedies: tuple[Remedy, ...]) -> Cause:
    return found.cause.model_copy(update={"remedies": remedies})


def _fitting(scene: Scene, found: _Finding) -> Iterator[Trial]:
    """Yield what may mend numbers that are not finite."""
    samples = found.cause.samples
    if found.fault is not None:
        yield from trials(scene, found.fault)
    elif samples and len(samples) < (size := math.prod(found.cause.inputs[0].shape[:1])):
        yield replace_samples(scene, samples, size, here=scene.rank == found.cause.rank)


# Looking --------------------------------------------------------------------------------------------------------------


def _find(scene: Scene) -> _Finding | None:
    """Return where a scene breaks on this rank; None if it does not."""
    known = _poisoned(scene) or _data(scene)
    if known is not None and not scene.together:
        return _Finding(cause=known)
    try:
        replayed = _replayed(scene)  # where ranks run together, also for the others that may have to see it
    except replay.NoRoomError:  # gradients are kept aside, and ranges are counted in copies
        replayed = _Finding(cause=_unseen(scene, (), _NO_ROOM))
    return replayed if known is None else _Finding(cause=known)


def _replayed(scene: Scene) -> _Finding | None:
    paths = Paths(scene.model)
    sentinel = Sentinel(paths)
    outcome = replay.run(scene, paths.following(), sentinel)
    loss_broke = not bool(torch.isfinite(outcome.loss_tensor).all())
    if not loss_broke and not outcome.broken:
        return None
    fault = sentinel.origin([outcome.loss_tensor] if loss_broke else outcome.broken_tensors)
    if fault is None and sentinel.faults:
        fault = sentinel.faults[0]
    if fault is None:
        why = "no operator that PyTorch dispatches gave the first number that is not finite"
        return _Finding(cause=_unseen(scene, outcome.broken, why))
    return _Finding(cause=_cause(scene, fault, _sentence(fault)), fault=fault)


def _find_zeros(scene: Scene, names: Collection[str]) -> _Finding | None:
    """Return where gradients become zero on this rank; None if some do not."""
    try:
        return _replayed_zeros(scene, names)
    except replay.NoRoomError:
        return _Finding(cause=_unseen_zeros(scene, names, _NO_ROOM))


def _replayed_zeros(scene: Scene, names: Collection[str]) -> _Finding | None:
    paths = Paths(scene.model)
    sentinel = Sentinel(paths, zeros=True)
    outcome = replay.run(scene, paths.following(), sentinel)
    zero = [outcome.gradients[name] for name in reversed([*outcome.gradients]) if not names or name in names]
    if not zero or any(outcome.filled.get(name, 0) for name in names or outcome.filled):
        return None
    fault = sentinel.origin(zero[:1])
    if fault is None and not names and sentinel.faults:
        fault = sentinel.faults[0]  # sums over ranks lead to nowhere
    if fault is None:
        return _Finding(cause=_unseen_zeros(scene, names, "no operator that PyTorch dispatches made them zero"))
    given = max((_size(one) for one in fault.inputs[:-1]), default=0.0)
    kind = _SHORT.get(fault.result.dtype, fault.result.dtype)
    smallest = torch.finfo(fault.dtype).smallest_normal * torch.finfo(fault.dtype).eps
    seen = (
        f"{fault.operator} in {fault.place.node} made all {_count(fault.result)} numbers of a gradient zero: what came in "
        f"reaches {given:.3g} at a loss scale of {scene.scale:g}, and half of {kind}'s smallest number is {smallest / 2:.3g}; "
        + _without(names)
    )
    return _Finding(cause=_cause(scene, fault, seen, layer=fault.place.towards), fault=fault)


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


def _data(scene: Scene) -> Cause | None:
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


def _unseen_zeros(scene: Scene, names: Collection[str], why: str) -> Cause:
    return Cause(
        step=scene.step,
        rank=scene.rank,
        part=Part.BACKWARD,
        layer=max(names, default="").rpartition(".")[0],
        operator=_UNKNOWN,
        kind="zero",
        seen=f"{why}; {_without(names)}",
    )


def _without(names: Collection[str]) -> str:
    """Say which parameters get no gradient."""
    return f"{', '.join(sorted(names))} get no gradient" if names else "no parameter gets a gradient"


def _cause(scene: Scene, fault: Fault, seen: str, layer: str | None = None) -> Cause:
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
    broken = sum(one.infinite for one in fault.inputs[:-1])
    if broken:
        text += f"{', and' if inputs else '; of its inputs'} {broken} are infinite"
    if fault.kind == "inf" and fault.overflows and fault.wide:
        text += f", and float64 gives up to {fault.wide:.4g}, beyond the {torch.finfo(fault.dtype).max:.5g} of {kind}"
    elif fault.kind == "nan" and fault.overflows:
        text += f", and float64 gives finite numbers: {kind} is too narrow for what is computed on the way"
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

"""What may mend a fault, each tried in a replay before anybody recommends it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from narrowcast.errors import NarrowcastError
from narrowcast.training.doctor import replay
from narrowcast.training.doctor.interventions import (
    Change,
    Rewrite,
    clamp_inputs,
    gathered_narrow,
    in_format,
    power_of_two_below,
    rewriting,
    shrink_weights,
    with_epsilon,
    without_maximum,
)
from narrowcast.training.doctor.paths import OUTSIDE, Paths, bare, in_words, layer_names
from narrowcast.training.doctor.replay import Outcome, Scene
from narrowcast.training.doctor.sentinel import Fault
from narrowcast.training.doctor.values import Part, Remedy
from narrowcast.training.policies import precision

__all__ = ["Trial", "lower_scale", "raise_scale", "replace_samples", "trials", "try_all"]

_EPSILONS = {torch.float16: 2.0**-12, torch.bfloat16: 2.0**-20, torch.float32: 2.0**-20}
_ROOM = 4.0  # how far below a format's limit a clamp or a smaller initialisation aims
_WIDE_WEIGHTS = 4.0  # root mean square times sqrt(fan-in) above which an initialisation is suspected


@dataclass(frozen=True)
class Trial:
    """A remedy that has not been tried yet.

    Attributes:
        kind: See :class:`narrowcast.training.doctor.values.Remedy`.
        setting: What to do, in words.
        run: Replays with it; the note says what is to be added to the evidence.
        overrides: The same for ``precision(..., overrides=...)``.
        sound: Whether an outcome counts as mended; loss and gradients finite unless given.
    """

    kind: str
    setting: str
    run: Callable[[], tuple[Outcome, str]]
    overrides: tuple[tuple[str, str], ...] = ()
    sound: Callable[[Outcome], bool] = lambda outcome: outcome.finite


def try_all(found: Iterator[Trial]) -> tuple[Remedy, ...]:
    """Try remedies and return them, those that mended first."""
    done = [_tried(trial) for trial in found]
    return tuple(sorted(done, key=lambda remedy: not remedy.mended))


def _tried(trial: Trial) -> Remedy:
    try:
        outcome, note = trial.run()
    except replay.PartedError:
        raise
    except (RuntimeError, TypeError, ValueError, NarrowcastError) as error:  # what a model raises when it is changed
        return _remedy(trial, False, f"the replay with it raised {type(error).__name__}: {str(error).splitlines()[0]}")
    mended = trial.sound(outcome)
    seen = f"loss {outcome.loss:.4g}, " + (
        f"{len(outcome.broken)} gradients not finite, first that of {outcome.broken[0]}"
        if outcome.broken
        else "all gradients finite"
    )
    return _remedy(trial, mended, f"the replay with it gave {seen}" + (f"; {note}" if note else ""))


def _remedy(trial: Trial, mended: bool, evidence: str) -> Remedy:
    return Remedy(
        kind=trial.kind,
        setting=trial.setting,
        mended=mended,
        evidence=evidence,
        overrides=dict(trial.overrides),
    )


def trials(scene: Scene, fault: Fault) -> Iterator[Trial]:
    """Yield the remedies that fit a fault, the least invasive first."""
    function = fault.operator.split(".")[-1].rstrip("_")
    backward = fault.place.part is Part.BACKWARD
    if function in ("exp", "exp2"):
        yield _rewritten(scene, fault, "maximum", "subtract the maximum before the exponential", without_maximum())
    if any(one.zeros for one in fault.inputs[:-1]) and (not fault.overflows or fault.kind == "nan"):
        yield from _epsilons(scene, fault)
    if backward and scene.scale != 1.0:
        yield lower_scale(scene)
    yield from _formats(scene, fault)
    if fault.overflows and not backward:
        yield from _smaller(scene, fault)


def _formats(scene: Scene, fault: Fault) -> Iterator[Trial]:
    """Yield the layer, what it stands in, and all of the model in a wider format."""
    base, layer = scene.precision.compute, fault.place.layer
    if not scene.precision.mixed or gathered_narrow(scene.model):
        return
    for name in (layer, layer.rpartition(".")[0]):
        if name and name != OUTSIDE:
            for format in ("fp32", "bf16"):
                if format != base:
                    yield _override(scene, name, format)
    if base == "fp16":
        wide = scene.but(precision=precision("bf16-mixed"), scale=1.0)
        yield Trial("format", "train in bf16-mixed", lambda: (replay.run(wide), ""))


def _override(scene: Scene, layer: str, format: str) -> Trial:
    def run() -> tuple[Outcome, str]:
        model = bare(scene.model)
        return replay.run(scene, in_format(model, _own_name(model, layer), format, scene.precision.compute)), ""

    return Trial("layer", f"keep layer {layer!r} in {format}", run, ((layer, format),))


def _own_name(model: nn.Module, layer: str) -> str:
    """Return the name that a module has in the model as it is, wrappers included."""
    names = layer_names(model)
    return next(name for name, part in model.named_modules() if names[id(part)] == layer)


def _epsilons(scene: Scene, fault: Fault) -> Iterator[Trial]:
    epsilon = _EPSILONS.get(fault.dtype, 2.0**-20)
    lost = lost_epsilon(fault)
    now = f" (it is {lost:.0e} now, which {_short(fault.dtype)} rounds to zero)" if lost else ""
    setting = f"keep an epsilon of {epsilon:.1g} or more in {_function(fault)}{now}"
    yield _rewritten(scene, fault, "epsilon", setting, with_epsilon(epsilon))


def lost_epsilon(fault: Fault) -> float | None:
    """Return a number that was added to an input of an operator and that the format rounds to zero, if there is one."""
    for maker in fault.makers:
        if maker is None or maker.operator.split(".")[-1].rstrip("_") not in ("add", "clamp_min", "clamp"):
            continue
        for scalar in maker.scalars:
            if scalar and not torch.tensor(scalar, dtype=torch.float64).to(maker.dtype):
                return scalar
    return None


def _rewritten(scene: Scene, fault: Fault, kind: str, setting: str, change: Change) -> Trial:
    layer = fault.place.layer

    def run() -> tuple[Outcome, str]:
        paths = Paths(scene.model)
        rewrite = Rewrite(paths, layer, change)
        if layer == OUTSIDE:

            def loss(outputs: Any, targets: Any) -> Any:
                with rewrite:
                    return scene.loss(outputs, targets)

            outcome = replay.run(scene.but(loss=loss), paths.following())
        else:
            outcome = replay.run(scene, paths.following(), rewriting(bare(scene.model), rewrite, layer))
        return outcome, f"{rewrite.changed} calls changed" if rewrite.changed else "no call of this layer fits"

    return Trial(kind, f"in {in_words(layer)}, {setting}", run)


def _smaller(scene: Scene, fault: Fault) -> Iterator[Trial]:
    """Yield a smaller initialisation where weights are wide, and clamped inputs."""
    layer, model = fault.place.layer, bare(scene.model)
    names = layer_names(model)
    part = next((part for part in model.modules() if names.get(id(part)) == layer), None)
    if part is None or layer == OUTSIDE or not fault.wide:
        return
    excess = fault.wide / torch.finfo(fault.dtype).max * _ROOM
    weight = next((one for one in part.parameters(recurse=False) if one.dim() > 1), None)
    if weight is not None and excess > 1 and (spread := _spread(weight)) > _WIDE_WEIGHTS:
        factor = power_of_two_below(1 / excess)
        setting = (
            f"start {in_words(layer)} with weights {1 / factor:g} times smaller "
            f"(their spread times sqrt(fan-in) is {spread:.3g})"
        )
        yield _within(scene, "initialisation", setting, lambda: shrink_weights(model, layer, factor))
    largest = max(
        (abs(end) for one in fault.inputs[:-1] for end in (one.low, one.high) if end is not None), default=0.0
    )
    if excess > 1 and largest and any(True for _ in part.parameters(recurse=False)):
        limit = power_of_two_below(largest / excess)
        yield _within(
            scene,
            "clipping",
            f"clip the inputs of {in_words(layer)} to ±{limit:g}",
            lambda: clamp_inputs(model, layer, limit),
        )


def _spread(weight: Tensor) -> float:
    """Return the root mean square of all of a weight, times the square root of its fan-in."""
    squares = replay.whole(weight.detach().float().square().sum())
    return math.sqrt(float(squares) / weight.numel() * math.prod(weight.shape[1:]))


def _within(scene: Scene, kind: str, setting: str, context: Callable[[], AbstractContextManager[Any]]) -> Trial:
    return Trial(kind, setting, lambda: (replay.run(scene, context()), ""))


def lower_scale(scene: Scene) -> Trial:
    """Return the trial of the largest smaller loss scale, by factors of four, that overflows nothing."""

    def run() -> tuple[Outcome, str]:
        scale = scene.scale
        while True:
            scale /= 4
            outcome = replay.run(scene.but(scale=scale))
            if outcome.finite or scale < 2.0**-24 or not outcome.loss_finite:
                return outcome, f"at a loss scale of {scale:g}"

    return Trial("scale", f"lower the loss scale (now {scene.scale:g})", run)


def raise_scale(scene: Scene, names: Collection[str] = ()) -> Trial:
    """Return the trial of the smallest larger loss scale, by factors of 16, with which most gradients are not zero.

    Args:
        scene: The step.
        names: Parameters that have to get one; any unless given.
    """

    def run() -> tuple[Outcome, str]:
        scale, best, note = (
            scene.scale,
            replay.run(scene),
            f"no scale gave gradients that are not zero, from {scene.scale:g} on",
        )
        while scale < 2.0**40:
            scale *= 16
            outcome = replay.run(scene.but(scale=scale))
            if not outcome.finite:
                break
            if outcome.nonzero > best.nonzero * 1.05:
                best = outcome
                note = f"at a loss scale of {scale:g}, {outcome.nonzero:.1%} of the gradients' numbers are not zero"
        return best, note

    def sound(outcome: Outcome) -> bool:
        return outcome.finite and any(outcome.filled.get(name) for name in names or outcome.filled)

    return Trial("scale", f"raise the loss scale (now {scene.scale:g})", run, sound=sound)


def replace_samples(scene: Scene, samples: tuple[int, ...], size: int, *, here: bool) -> Trial:
    """Return the trial of the batch with another sample in the place of some: its shape stays, as some models need.

    Args:
        scene: The step.
        samples: Positions along the first axis.
        size: Length of the first axis, more than there are samples; tensors of another length stay as they are.
        here: Whether they are in this rank's batch; else it runs as it is.
    """
    sound = next(row for row in range(size) if row not in samples)

    def run() -> tuple[Outcome, str]:
        def replaced(tensor: Tensor) -> Tensor:
            if not here or not tensor.dim() or len(tensor) != size:
                return tensor
            return tensor[[sound if row in samples else row for row in range(size)]]

        batch = tree_map_only(Tensor, replaced, scene.batch)
        return replay.run(scene.but(batch=tuple(batch))), f"with sample {sound} in its place"

    which = ", ".join(map(str, samples[:8])) + (" ..." if len(samples) > 8 else "")
    return Trial("data", f"leave out or repair sample {which} of the batch", run)


def _function(fault: Fault) -> str:
    """Return the operator as people call it; in the backward pass the one that is differentiated."""
    node = fault.place.node.partition("Backward")[0].lower()
    return node or fault.operator.split(".")[-1].rstrip("_")


def _short(dtype: torch.dtype) -> str:
    return {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}.get(dtype, str(dtype))

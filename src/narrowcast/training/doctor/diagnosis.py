"""From what was counted to what is wrong: which findings are normal, which need a replay, and what it showed."""

from __future__ import annotations

import json
import math
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from typing import Any

import torch
from torch import Tensor

from narrowcast.training.doctor import replay
from narrowcast.training.doctor.casts import CastCounter, Found, Probe, Probed
from narrowcast.training.doctor.cause import agreed, agreed_cause, explain_vanishing
from narrowcast.training.doctor.exchange import gather
from narrowcast.training.doctor.paths import Paths, bare, in_words
from narrowcast.training.doctor.replay import Scene
from narrowcast.training.doctor.sampling import Target
from narrowcast.training.doctor.sentinel import Sentinel
from narrowcast.training.doctor.updates import explain_stagnation
from narrowcast.training.doctor.values import Cause, Event, EventKind, Part, Remedy
from narrowcast.training.doctor.verdict import cause_sentence
from narrowcast.training.loss_scale import DynamicScale
from narrowcast.training.policies import Precision

__all__ = ["Diagnosis"]

_REPLAYS = 8  # causes that are looked for in a run
_GROWN = 64  # updates after which left-out steps are judged by how many they are
_OFTEN = 0.2  # share of the latest steps that a healthy dynamic scale leaves out at most
_ZERO_STEPS = 3  # steps without any gradient in a row
_ZERO_SAMPLES = 2  # samples without any gradient of one layer in a row
_STUCK = 0.9  # share of the numbers with a gradient that do not move
_SAMPLES = 2000  # numbers with a gradient that have to be seen first


class Diagnosis:
    """Judges findings and explains them.

    Args:
        precision: The policy.
        optimizer: What moves the weights, if it is known.
        rank: Number of this process.
    """

    def __init__(self, precision: Precision, optimizer: torch.optim.Optimizer | None, rank: int) -> None:
        self._precision = precision
        self._optimizer = optimizer
        self._rank = rank
        self._replays = 0
        self._skips: deque[int] = deque(maxlen=_GROWN)  # updates done before each left-out step, the latest
        self._zero_steps = 0
        self._zero_samples: Counter[int] = Counter()  # by target, in a row
        self._faint: list[int] = []  # targets without a gradient that wait to be looked at
        self._stuck: Tensor | None = None
        self._suspect: int | None = None
        self._cast: Found | None = None
        self._told: set[EventKind] = set()

    @property
    def pending(self) -> bool:
        """Whether something waits to be explained."""
        return bool(self._waiting())

    def _waiting(self) -> set[EventKind]:
        waiting = {
            EventKind.VANISHED: bool(self._zero_steps >= _ZERO_STEPS or self._faint)
            and EventKind.VANISHED not in self._told,
            EventKind.STAGNATION: self._suspect is not None,
            EventKind.SATURATION: self._cast is not None,
        }
        return {kind for kind, waits in waiting.items() if waits}

    # Steps that broke

    def nonfinite(self, scene: Scene, updates: int) -> list[Event]:
        """Return what is to be said of a step that was left out; every rank has to call it.

        Args:
            scene: The micro-batch.
            updates: Done so far.
        """
        self._skips.append(updates)
        if self._is_backoff(scene, updates):
            sentence = (
                f"Step {scene.step}: left out at a loss scale of {scene.scale:g}; without it the gradients are finite, so "
                "the dynamic scale falls: normal"
            )
            return [Event(kind=EventKind.BACKOFF, step=scene.step, rank=self._rank, normal=True, sentence=sentence)]
        self._replays += 1
        cause = agreed_cause(scene) if self._replays <= _REPLAYS else None
        kind = EventKind.DATA if cause is not None and cause.operator == "data" else EventKind.NONFINITE
        if cause is None:
            why = (
                "the replay was sound"
                if self._replays <= _REPLAYS
                else f"it was not run again, as {_REPLAYS} such steps had been"
            )
            sentence = f"Step {scene.step}: a loss or a gradient was not finite; {why}"
        else:
            sentence = cause_sentence(cause)
        rank = self._rank if cause is None else cause.rank
        return [Event(kind=kind, step=scene.step, rank=rank, normal=False, sentence=sentence, cause=cause)]

    def _is_backoff(self, scene: Scene, updates: int) -> bool:
        """Return whether the scale alone is too high, as it is now and then while a dynamic scale is found."""
        if not isinstance(scene.precision.scale, DynamicScale):
            return False
        latest = [one for one in self._skips if one > updates - _GROWN]
        if updates >= _GROWN and len(latest) > _OFTEN * _GROWN:
            return False
        try:
            sound = replay.run(scene.but(scale=1.0)).finite
        except replay.NoRoomError:  # gradients are kept aside: whether the scale alone is too high is not known
            sound = False
        return all(text == "sound" for text in gather("sound" if sound else "broken", scene.device))

    # What counts say

    def read_norm(self, norm: float) -> None:
        """Read the norm of a step's gradients."""
        self._zero_steps = self._zero_steps + 1 if norm == 0 else 0

    def read_gradient(self, target: int, *, zero: bool) -> None:
        """Read whether all numbers of a target's gradients in a sample are zero; it is looked at once, then."""
        self._zero_samples[target] = self._zero_samples[target] + 1 if zero else 0
        if self._precision.mixed and self._zero_samples[target] == _ZERO_SAMPLES:
            self._faint.append(target)

    def read_stuck(self, stuck: Tensor) -> None:
        """Read, for each target, how many numbers have a gradient and did not move, and how many have one; shape [T, 2]."""
        self._stuck = stuck.clone() if self._stuck is None else self._stuck + stuck
        if self._precision.update != "plain" or EventKind.STAGNATION in self._told:
            return  # with stochastic rounding or Kahan sums a weight need not move in every step
        shares = torch.where(self._stuck[:, 1] >= _SAMPLES, self._stuck[:, 0] / self._stuck[:, 1].clamp(min=1), 0)
        if float(shares.max()) >= _STUCK:
            self._suspect = int(shares.argmax())

    def read_casts(self, places: Any, rows: list[list[float]]) -> None:
        """Read which casts cut numbers off."""
        found = [one for one in CastCounter.found(places, rows) if one.saturates]
        if found and EventKind.SATURATION not in self._told:
            self._cast = found[0]

    # What waits to be explained

    def explain(self, targets: Sequence[Target], scene: Scene | None, step: int) -> list[Event]:
        """Return what is to be said of findings that wait; every rank has to call it where the scene runs on all together.

        Args:
            targets: The modules.
            scene: The latest micro-batch; None where it cannot be run again.
            step: Its step.
        """
        waiting = self._waiting()
        if scene is not None and scene.together:
            said = gather(json.dumps(sorted(waiting)), scene.device)
            waiting = {EventKind(kind) for text in said for kind in json.loads(text)}
        found: list[tuple[EventKind, Cause | None]] = []
        if EventKind.VANISHED in waiting:
            found.append((EventKind.VANISHED, self._vanished(targets, scene, step)))
        if EventKind.STAGNATION in waiting:
            found.append((EventKind.STAGNATION, self._stagnation(targets, scene, step)))
            self._suspect = None
        if EventKind.SATURATION in waiting:
            found.append((EventKind.SATURATION, self._saturated(scene, step)))
            self._cast = None
        self._told |= {kind for kind, cause in found if cause is not None}
        return [
            Event(kind=kind, step=step, rank=cause.rank, normal=False, sentence=cause_sentence(cause), cause=cause)
            for kind, cause in found
            if cause is not None
        ]

    def _vanished(self, targets: Sequence[Target], scene: Scene | None, step: int) -> Cause | None:
        """Return where gradients vanish: all of them, or those of one layer if a larger scale brings them back."""
        if self._zero_steps >= _ZERO_STEPS:
            return (scene and explain_vanishing(scene)) or self._all_zero(step)
        if scene is None:
            return None
        waiting = self._faint
        if scene.together:
            waiting = [one for text in gather(json.dumps(waiting), scene.device) for one in json.loads(text)]
        nearest = max(waiting)  # to the loss: what makes its gradient zero does so for those before it
        self._faint = [one for one in self._faint if one != nearest]
        own = {id(one) for _, one in targets[nearest].parameters}
        names = [name for name, one in bare(scene.model).named_parameters() if id(one) in own]
        cause = explain_vanishing(scene, names)
        return cause if cause is not None and cause.mends else None  # some layers have none by design

    def _all_zero(self, step: int) -> Cause:
        return Cause(
            step=step,
            rank=self._rank,
            part=Part.BACKWARD,
            layer="",
            operator="unknown",
            kind="zero",
            seen=f"the gradients' norm was 0 in {_ZERO_STEPS} steps in a row",
            reproduced=False,
        )

    def _stagnation(self, targets: Sequence[Target], scene: Scene | None, step: int) -> Cause | None:
        """Return why weights stay where they are; of sharded ones, what the first rank says whose own part does."""
        cause = None if self._suspect is None else self._stagnant(targets[self._suspect], step)
        return agreed(cause, scene.device) if scene is not None and scene.together else cause

    def _stagnant(self, target: Target, step: int) -> Cause:
        assert self._stuck is not None
        assert self._suspect is not None
        share = float(self._stuck[self._suspect, 0] / self._stuck[self._suspect, 1])
        name, parameter = max(target.parameters, key=lambda entry: replay.local(entry[1].detach()).numel())
        if self._optimizer is None or parameter.grad is None:
            return Cause(
                step=step,
                rank=self._rank,
                part=Part.UPDATE,
                layer=target.name,
                operator="unknown",
                kind="stagnant",
                seen=f"{share:.1%} of the numbers that have a gradient did not move",
            )
        return explain_stagnation(
            self._optimizer, target.name, name, parameter, step=step, rank=self._rank, stuck=share
        )

    def _saturated(self, scene: Scene | None, step: int) -> Cause | None:
        """Return the cast that cut numbers off, with a fresh scale tried; of all ranks' the first, where they run together."""
        cast = self._cast
        probe = None
        if scene is not None:
            paths = Paths(scene.model)
            sentinel = Sentinel(paths)
            probe = None if cast is None else Probe(paths, cast, sentinel)
            with suppress(replay.NoRoomError):  # the cast was seen; where it comes from, and what mends it, is not
                replay.run(scene, paths.following(), sentinel, nullcontext() if probe is None else probe)
        cause = None if cast is None or _asked_for(cast, probe) else self._cut_off(cast, probe, step)
        return agreed(cause, scene.device) if scene is not None and scene.together else cause

    def _cut_off(self, cast: Found, probe: Probe | None, step: int) -> Cause:
        share = (cast.beyond + cast.infinite) / max(cast.numbers, 1)
        hidden = f", {cast.infinite} infinities among them" if cast.infinite else ""
        seen = (
            f"{cast.operator} cut off {share:.2%} of {cast.numbers} numbers at ±{cast.limit:g}, the end of {cast.format}"
            f"{hidden}: {'finite ones' if cast.infinite else 'they'} reach {cast.largest:.4g}, which what comes out does not "
            "show"
        )
        probed = None if probe is None else probe.probed
        if probed is not None and probed.origin is not None:
            origin = probed.origin
            seen += f"; the infinities come from {origin.operator} in {in_words(origin.place.layer)}"
        stale = probed is not None and not probed.inputs.infinite  # no scale brings back what is infinite already
        return Cause(
            step=step,
            rank=self._rank,
            part=cast.place.part,
            layer=cast.place.layer,
            operator=cast.operator,
            call=0 if probed is None else probed.call,
            kind="saturated",
            inputs=() if probed is None else (probed.inputs,),
            seen=seen,
            reproduced=probed is not None or probe is None,
            remedies=(_fresh_scale(probed),) if probed is not None and stale else (),
        )


def _asked_for(cast: Found, probe: Probe | None) -> bool:
    """Return whether a cast hides nothing but infinities that the program itself wrote, such as those of masks."""
    probed = None if probe is None else probe.probed
    return probed is not None and not cast.beyond and probed.origin is None


def _fresh_scale(probed: Probed) -> Remedy:
    return Remedy(
        kind="fresh scale",
        setting=f"take the scale from the tensor at hand: {probed.fresh:g} times the one in use, which is stale",
        mended=probed.fresh_snr > probed.snr and math.isfinite(probed.snr),
        evidence=f"in the replay the cast keeps {probed.fresh_snr:.1f} dB of signal over noise with it and "
        f"{probed.snr:.1f} dB as it is, and none of the numbers is cut off",
    )

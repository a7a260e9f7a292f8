"""BF16 weights that any optimizer updates in FP32, rounded stochastically or with a compensation.

BF16 holds 8 significand bits: a weight of 1 moves by 2^-8 (downwards) or 2^-7 (upwards) or not at all, and plain rounding
loses every update below half of that. Two ways keep them:

- ``stochastic``: up or down with the probability that makes the expected value exact (Gupta et al., 2015, section 3).
  Nothing more is stored.
- ``kahan``: what rounding cut off is stored in a second BF16 tensor and added before the next update (Kahan, 1965; for
  weights: Zamirai et al., 2020), so about 16 significand bits are kept.

The optimizer sees FP32 weights and FP32 gradients, and so keeps its states in FP32, for the time of its step: a moving
average with a decay of 0.999 would lose its updates in BF16 as well.

Memory in bytes for each parameter, with an optimizer of two states: 2 (weight) + 4 (gradient) + 8 (states), with ``kahan``
2 more, against 4 + 4 + 8 of ``bf16-mixed``. During the step, when activations are gone, the FP32 weights take 4 more, and
stochastic rounding up to 64 MiB of random bits.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from narrowcast.errors import TrainingError
from narrowcast.training import multi_tensor

__all__ = ["WideUpdate", "accumulate_in_fp32", "round_stochastically_"]

_log = logging.getLogger(__name__)
_CHUNK = 1 << 24  # elements that are rounded at once
_DROPPED = 16  # bits of FP32 that BF16 has not
_WORD = (1 << 64) - 1


class WideUpdate:
    """Gives BF16 parameters FP32 numbers for the time of an update; of sharded ones, this rank's part.

    Args:
        parameters: Those that the optimizer moves; all that are not BF16 are left alone.
        method: How the new weights are rounded.
        seed: Of stochastic rounding: ranks that hold the same weights must draw the same bits.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], method: Literal["plain", "stochastic", "kahan"], seed: int = 0
    ) -> None:
        self._narrow = [one for one in parameters if one.dtype == torch.bfloat16]
        self._method = method
        device = self._narrow[0].device if self._narrow else torch.device("cpu")
        self._generator = torch.Generator(device)
        self._seed = seed
        self._lost = [torch.zeros_like(one) for one in self._narrow] if method == "kahan" else []
        self._begun = False
        self._left_out: Tensor | None = None

    @contextmanager
    def widened(self, step: int) -> Generator[None]:
        """Hold FP32 weights in the parameters, and round what has become of them at the end, if :meth:`begin` was called.

        An exception leaves the weights as they were.

        Args:
            step: Updates made so far; it and the seed decide the random bits, however many other ranks draw.
        """
        if not self._narrow:
            yield
            return
        stored = [_local(one) for one in self._narrow]
        flat = torch.empty(sum(one.numel() for one in stored), dtype=torch.float32, device=stored[0].device)
        wide = [
            part.view_as(one) for part, one in zip(flat.split([one.numel() for one in stored]), stored, strict=True)
        ]
        multi_tensor.copy_(wide, stored)
        self._begun = False
        with self._holding(wide):
            yield
            if self._begun:
                self._round(stored, wide, flat, step)

    @torch.no_grad()
    def begin(self, left_out: Tensor | None) -> None:
        """Make the wide weights ready to move: add what rounding cut off before.

        Args:
            left_out: 1 if the update will leave them as they are after all, else 0 (0-d): then nothing is added and nothing
                is cut off anew, so that not a bit of either changes. None if it is known that they move.
        """
        self._begun, self._left_out = True, left_out
        if self._lost:
            lost = [_local(one) for one in self._lost]
            if left_out is not None:
                lost = multi_tensor.multiplied(lost, 1 - left_out)
            multi_tensor.add_([_local(one) for one in self._narrow], lost)

    @contextmanager
    def held(self) -> Generator[None]:
        """Hold FP32 weights in the parameters, and the BF16 ones again at the end as they were.

        An optimizer casts the states that it loads to the dtype of its parameters.
        """
        with self._holding([_local(one).float() for one in self._narrow]):
            yield

    @contextmanager
    def _holding(self, wide: list[Tensor]) -> Generator[None]:
        before = [_held(one, values) for one, values in zip(self._narrow, wide, strict=True)]
        try:
            yield
        finally:
            for one, values in zip(self._narrow, before, strict=True):
                _hold(one, values)

    @torch.no_grad()
    def _round(self, stored: list[Tensor], wide: list[Tensor], flat: Tensor, step: int) -> None:
        if self._method == "stochastic":  # what BF16 holds stays as it is
            round_stochastically_(flat, self._generator.manual_seed(_mixed(self._seed, step)))
        multi_tensor.copy_(stored, wide)
        if self._lost:
            lost = [_local(one) for one in self._lost]
            multi_tensor.subtract_(wide, stored)
            if self._left_out is None:
                multi_tensor.copy_(lost, wide)
            else:
                multi_tensor.multiply_(lost, self._left_out)
                multi_tensor.add_(lost, wide)

    def state_dict(self) -> dict[str, Any]:
        """Return what the next rounding depends on, beside the updates made so far: what rounding cut off."""
        return {"method": self._method, "device": self._generator.device.type, "lost": list(self._lost)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned; on another kind of device with other random bits.

        Raises:
            TrainingError: It belongs to another method or other weights.
        """
        if state["method"] != self._method or len(state["lost"]) != len(self._lost):
            raise TrainingError(
                f"the state was saved with update {state['method']!r} of BF16 weights, and this trainer has {self._method!r}",
                next_step=f"build the precision with update={state['method']!r}",
            )
        if state["device"] != self._generator.device.type:
            _log.warning("stochastic rounding goes on with other random bits: saved on %s", state["device"])
        for one, saved in zip(self._lost, state["lost"], strict=True):
            _local(one).copy_(_local(saved))


def _local(tensor: Tensor) -> Tensor:
    """Return the numbers of a tensor that this process holds, as a view without gradient."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.data


def _held(parameter: nn.Parameter, values: Tensor) -> Tensor:
    """Have a parameter hold other numbers, of which this process gives its own; return the tensor that it held."""
    before = parameter.detach()
    if isinstance(before, DTensor):
        mesh, placements = before.device_mesh, before.placements
        values = DTensor.from_local(
            values, mesh, placements, run_check=False, shape=before.shape, stride=before.stride()
        )
    _hold(parameter, values)
    return before


def _hold(parameter: nn.Parameter, values: Tensor) -> None:
    """Have a parameter hold a tensor's numbers."""
    parameter.data = values
    if isinstance(parameter, DTensor) and isinstance(values, DTensor):  # whose numbers and whose description lie apart
        parameter._local_tensor = values._local_tensor  # pyright: ignore[reportPrivateUsage]
        parameter._spec = values._spec  # pyright: ignore[reportPrivateUsage]


def _mixed(seed: int, step: int) -> int:
    """Return the seed of an update: 32 bits, as many as the CPU's generator takes (the finaliser of SplitMix64)."""
    mixed = (seed * 0x9E3779B97F4A7C15 + step + 1) * 0xBF58476D1CE4E5B9 & _WORD
    mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & _WORD
    return mixed >> 32


def accumulate_in_fp32(parameters: Iterable[nn.Parameter]) -> None:
    """Have autograd add up the gradients of BF16 parameters in FP32."""
    for one in parameters:
        if one.dtype == torch.bfloat16:
            one.grad_dtype = torch.float32


def round_stochastically_(values: Tensor, generator: torch.Generator) -> Tensor:
    """Round contiguous FP32 numbers to numbers of BF16, in place, up or down so that the expected value is exact.

    A random number below 2^16 is added to the bits, and the lower 16 are cleared: the magnitude goes up with the
    probability that they stood for. Numbers that BF16 holds stay as they are, as do infinities and NaN. A finite number
    beyond BF16's largest may become infinite.

    Returns:
        ``values``.
    """
    for part in values.view(-1).split(_CHUNK):
        bits = part.view(torch.int32)
        noise = torch.randint(0, 1 << _DROPPED, bits.shape, dtype=torch.int32, device=part.device, generator=generator)
        rounded = noise.add_(bits).bitwise_and_(-1 << _DROPPED)
        part.copy_(torch.where(part.isfinite(), rounded.view(torch.float32), part))
    return values

"""AdamW that unscales, measures and clips gradients in the same two passes over memory as its update.

PyTorch's own parts take four passes (unscale, norm, clip, update) and read or write each gradient six times. Here each
gradient is read twice, and the host waits for nothing: whether every gradient is finite is decided on the device, and an
update that does not count leaves parameters, moments and step counters as they are.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, Protocol, get_args, overload

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer

from narrowcast.errors import TrainingError, choices
from narrowcast.training import adamw_reference
from narrowcast.training.adamw_reference import NAN, Group, Member, Verdict

__all__ = ["FusedAdamW", "Rounding", "adamw"]

Rounding = Literal["nearest", "stochastic", "kahan"]
Parameters = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]

_PARAMETERS = (torch.float32, torch.bfloat16)
_GRADIENTS = (torch.float32, torch.bfloat16, torch.float16)
_MOMENTS = ("exp_avg", "exp_avg_sq")


def adamw(
    params: Parameters,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
) -> FusedAdamW | AdamW:
    """Return AdamW as it is fastest where the parameters are.

    On CUDA with Triton that is :class:`FusedAdamW`; elsewhere, and for sharded parameters, torch.optim.AdamW with its
    fused kernels. The measurements are in benchmarks/results/training-gpu-update.json.
    """
    listed: list[Any] = list(params)
    tensors = _tensors(listed)
    ours = all(x.device.type == "cuda" and x.dtype in _PARAMETERS and not isinstance(x, DTensor) for x in tensors)
    if ours and _has_triton():
        return FusedAdamW(listed, lr, betas, eps, weight_decay)
    fused = all(x.device.type in ("cuda", "cpu") for x in tensors)
    return AdamW(listed, lr, betas, eps, weight_decay, fused=fused)


class FusedAdamW(Optimizer):
    """AdamW (Loshchilov and Hutter, 2019) fused with unscaling, the global norm and clipping.

    State has torch.optim.AdamW's names (``step``, ``exp_avg``, ``exp_avg_sq``), so either loads what the other saved.
    Moments are FP32 for BF16 parameters too. Where every gradient is finite and nothing is clipped, ``step()`` gives
    torch.optim.AdamW's parameters within a few units in the last place; on CUDA with Triton it runs two kernels, elsewhere
    the reference in plain torch, with the same bits.

    Args:
        params: FP32 or BF16 parameters on one device, or groups of them, as any torch optimizer takes them.
        lr: Learning rate, a host number; schedules may change it between steps.
        betas: Decay of the moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled: each step multiplies parameters by 1 - lr * weight_decay.
        rounding: How BF16 parameters are rounded: "nearest"; "stochastic", up with the probability that the lost digits
            make, so that small updates count on average; "kahan", which keeps the lost digits in a second BF16 tensor.
        seed: Of stochastic rounding. The random bits depend on it, on the step, and on the place of the element alone.
        zero_gradients: Whether an update sets the gradients to zero, which keeps their memory.

    Raises:
        TrainingError: A setting or a parameter that it does not take.
    """

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        rounding: Rounding = "nearest",
        seed: int = 0,
        zero_gradients: bool = False,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        _check_settings({**defaults, "rounding": rounding, "seed": seed})
        self._zero = zero_gradients
        self._engine: _Engine | None = None
        self._steps = torch.empty(0)  # of the parameters that took part last, in the order of _counted
        self._counted: list[Tensor] = []
        self._scale: tuple[float, Tensor] | None = None
        self.grad_norm: Tensor | None = None
        self.finite: Tensor | None = None
        self._verdict: Verdict | None = None
        super().__init__(params, {**defaults, "rounding": rounding, "seed": seed})

    def update(self, inverse_scale: float | Tensor = 1.0, clip_norm: float | None = None) -> tuple[Tensor, Tensor]:
        """Unscale, clip and update in one; nothing waits for the device.

        Args:
            inverse_scale: What the gradients are multiplied by before anything else; a tensor stays on the device.
            clip_norm: Norm above which unscaled gradients are scaled down to it.

        Returns:
            The norm of the unscaled gradients before clipping (float32), and whether every gradient was finite (bool);
            no dimension, on the device. Where not, nothing was updated. A norm beyond 1.8e19, whose square float32
            cannot hold, counts as infinite.
        """
        self.step(inverse_scale=inverse_scale, clip_norm=clip_norm)
        assert self.grad_norm is not None
        assert self.finite is not None
        return self.grad_norm, self.finite

    @overload
    def step(
        self, closure: None = None, *, inverse_scale: float | Tensor = ..., clip_norm: float | None = ...
    ) -> None: ...

    @overload
    def step(
        self, closure: Callable[[], float], *, inverse_scale: float | Tensor = ..., clip_norm: float | None = ...
    ) -> float: ...

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], float] | None = None,
        *,
        inverse_scale: float | Tensor = 1.0,
        clip_norm: float | None = None,
    ) -> float | None:
        """As :meth:`update`, in the form that schedules and other code expect; returns the closure's loss.

        ``grad_norm`` and ``finite`` are attributes afterwards.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self._gathered()
        members = [member for group in groups for member in group.members]
        if not members:
            raise TrainingError(
                "no parameter has a gradient", next_step="call backward() before the update, on a loss that needs them"
            )
        steps = self._counters([member.parameter for member in members], groups)
        device = steps.device
        if self._engine is None:
            self._engine = _engine(device)
        scale = self._on_device(inverse_scale, device)
        self._verdict = self._engine(groups, steps, scale, clip_norm, zero=self._zero)
        self.grad_norm, self.finite = self._verdict.norm, self._verdict.finite
        for parameter, gradient in ((member.parameter, member.gradient) for member in members):
            if self._zero and gradient is not parameter.grad and parameter.grad is not None:
                parameter.grad.zero_()
        return loss

    def broken(self) -> list[tuple[Tensor, int, int]]:
        """Return the parameters whose gradients were not finite in the last update; waits for the device.

        The gradients themselves may be gone: the update has counted.

        Returns:
            Of each, how many elements were infinite and how many NaN.
        """
        if self._verdict is None:
            return []
        found = [[0, 0] for _ in self._counted]
        for member, count in zip(self._verdict.members.tolist(), self._verdict.broken.tolist(), strict=True):
            found[member][0] += count % NAN
            found[member][1] += count // NAN
        return [(one, inf, nan) for one, (inf, nan) in zip(self._counted, found, strict=True) if inf or nan]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch does; raises TrainingError for parameters that it does not take."""
        super().add_param_group(param_group)
        _check_settings(param_group)
        for parameter in param_group["params"]:
            _check_parameter(parameter)
        devices = {parameter.device for group in self.param_groups for parameter in group["params"]}
        if len(devices) > 1:
            names = ", ".join(sorted(str(device) for device in devices))
            raise TrainingError(
                f"parameters on {names}", allowed="one device", next_step="make an optimizer for each device"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return torch's dictionary; the step counters are copies, as they share memory here."""
        found = super().state_dict()
        found["state"] = {key: {**one, "step": one["step"].clone()} for key, one in found["state"].items()}
        return found

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """As torch does, but the moments keep FP32 for parameters of BF16 too; takes torch.optim.AdamW's state.

        Raises:
            TrainingError: The state is another optimizer's, or AdamW's with ``amsgrad``.
        """
        if any(group.get("amsgrad") for group in state_dict["param_groups"]):
            raise TrainingError("a state with amsgrad", next_step="continue it with torch.optim.AdamW")
        super().load_state_dict(dict(state_dict))
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        own = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, parameter in zip(saved, own, strict=True):
            if index in state_dict["state"]:
                self.state[parameter] = _restored(state_dict["state"][index], parameter)
        self._counted = []

    def _gathered(self) -> list[Group]:
        """Return the parameters that have gradients, with their state."""
        groups: list[Group] = []
        place = 0
        for group in self.param_groups:
            members: list[Member] = []
            for index, parameter in enumerate(group["params"], place):
                if parameter.grad is not None and parameter.numel():
                    members.append(self._member(index, parameter, group["rounding"]))
            place += len(group["params"])
            groups.append(
                Group(
                    float(group["lr"]),
                    *(group["betas"], group["eps"], group["weight_decay"]),
                    *(group["rounding"] == "stochastic", group["seed"], members),
                )
            )
        return groups

    def _member(self, index: int, parameter: Tensor, rounding: Rounding) -> Member:
        state = self.state[parameter]
        kahan = rounding == "kahan" and parameter.dtype is torch.bfloat16
        if "exp_avg" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            for name in _MOMENTS:
                state[name] = torch.zeros_like(parameter, dtype=torch.float32)
        if kahan and "compensation" not in state:
            state["compensation"] = torch.zeros_like(parameter)
        gradient = _gradient(parameter)
        compensation = state["compensation"] if kahan else None
        return Member(index, parameter, gradient, state["exp_avg"], state["exp_avg_sq"], compensation)

    def _counters(self, parameters: list[Tensor], groups: list[Group]) -> Tensor:
        """Return the step counters as one tensor, of which each parameter's state is a view."""
        same = len(parameters) == len(self._counted) and all(map(_is, parameters, self._counted))
        if not same:
            self._steps = torch.stack([self.state[parameter]["step"] for parameter in parameters])
            for parameter, step in zip(parameters, self._steps.unbind(), strict=True):
                self.state[parameter]["step"] = step
            self._counted = parameters
        return self._steps

    def _on_device(self, inverse_scale: float | Tensor, device: torch.device) -> Tensor:
        if isinstance(inverse_scale, Tensor):
            return inverse_scale.detach().to(device, torch.float32, non_blocking=True).reshape(())
        if self._scale is None or self._scale[0] != inverse_scale or self._scale[1].device != device:
            self._scale = inverse_scale, torch.full((), inverse_scale, dtype=torch.float32, device=device)
        return self._scale[1]


class _Engine(Protocol):
    def __call__(
        self, groups: list[Group], steps: Tensor, inverse_scale: Tensor, clip_norm: float | None, *, zero: bool
    ) -> Verdict: ...


def _engine(device: torch.device) -> _Engine:
    """Return the kernels where they run, else the reference."""
    if device.type == "cuda" and _has_triton():
        # Imported here because Triton need not be there.
        return importlib.import_module("narrowcast.training.triton_adamw").Kernels().update
    return adamw_reference.update


def _has_triton() -> bool:
    # Only NVIDIA's compiler was checked to round each operation as IEEE 754 says.
    return torch.version.cuda is not None and importlib.util.find_spec("triton") is not None


def _is(one: Tensor, other: Tensor) -> bool:
    return one is other


def _tensors(listed: list[Any]) -> list[Tensor]:
    """Return the parameters of any form that torch's optimizers take."""
    found: list[Tensor] = []
    for one in listed:
        if isinstance(one, dict):
            found += _tensors(list(one["params"]) if not isinstance(one["params"], Tensor) else [one["params"]])
        else:
            found.append(one[1] if isinstance(one, tuple) else one)
    return found


def _gradient(parameter: Tensor) -> Tensor:
    """Return a parameter's gradient in the parameter's order in memory: itself, but for rare ones a copy."""
    gradient = parameter.grad
    assert gradient is not None
    if gradient.layout is not torch.strided or gradient.dtype not in _GRADIENTS:
        raise TrainingError(
            f"a gradient of {gradient.dtype}, {gradient.layout}",
            allowed="dense gradients of float32, bfloat16 or float16",
            next_step="use torch.optim.AdamW for this model",
        )
    if not _same_order(gradient, parameter):
        gradient = torch.empty_like(parameter, dtype=gradient.dtype).copy_(gradient)
    return gradient


def _restored(saved: Mapping[str, Any], parameter: Tensor) -> dict[str, Tensor]:
    """Return one parameter's state on its device, in the dtypes and the order in memory that the update needs."""
    missing = {"step", *_MOMENTS} - set(saved)
    if missing:
        raise TrainingError(
            f"an optimizer state without {', '.join(sorted(missing))}",
            allowed="what FusedAdamW or torch.optim.AdamW saved",
        )
    step = torch.as_tensor(saved["step"], dtype=torch.float32).to(parameter.device, copy=True).reshape(())
    state = {"step": step}
    for name in (*_MOMENTS, "compensation"):
        if name in saved:
            dtype = torch.float32 if name in _MOMENTS else parameter.dtype
            state[name] = torch.empty_like(parameter, dtype=dtype, requires_grad=False).copy_(saved[name])
    return state


def _check_settings(settings: Mapping[str, Any]) -> None:
    lr, betas, rounding = settings["lr"], settings["betas"], settings["rounding"]
    if isinstance(lr, Tensor) or lr < 0:
        raise TrainingError(f"lr {lr!r}", allowed="a number of at least 0, no tensor")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise TrainingError(f"betas {betas!r}", allowed="two numbers from 0 to below 1")
    for name in ("eps", "weight_decay"):
        if settings[name] < 0:
            raise TrainingError(f"{name} {settings[name]!r}", allowed="a number of at least 0")
    if rounding not in get_args(Rounding):
        raise TrainingError(f"rounding {rounding!r}", allowed=choices(str(rounding), get_args(Rounding)))
    if not 0 <= settings["seed"] < 1 << 63:
        raise TrainingError(f"seed {settings['seed']!r}", allowed="whole numbers from 0 to below 2**63")


def _check_parameter(parameter: Tensor) -> None:
    if isinstance(parameter, DTensor):
        raise TrainingError(
            "a sharded parameter (DTensor)",
            allowed="parameters that each rank holds as a whole",
            next_step="use torch.optim.AdamW(fused=True) for sharded models",
        )
    if parameter.dtype not in _PARAMETERS:
        raise TrainingError(f"a parameter of {parameter.dtype}", allowed="torch.float32, torch.bfloat16")
    if not _is_dense(parameter):
        raise TrainingError(
            f"a parameter of shape {tuple(parameter.shape)} with strides {parameter.stride()}",
            allowed="parameters that fill their memory without gaps or overlaps",
            next_step="make it contiguous before the optimizer is made",
        )


def _is_dense(x: Tensor) -> bool:
    """Return whether the elements fill a stretch of memory, in any order of dimensions."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _same_order(x: Tensor, like: Tensor) -> bool:
    pairs = zip(x.shape, x.stride(), like.stride(), strict=True)
    return all(mine == its for size, mine, its in pairs if size != 1)

"""Precision policies of training, by name: what is stored, what is computed in, how the loss is scaled.

>>> precision("fp16-mixed", loss_scale=1024.0).scale
StaticScale(value=1024.0, patience=50)
>>> precision("bf16-true").update
'stochastic'
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.compiler import config as compilation

from narrowcast.errors import DeviceError, FormatError, choices
from narrowcast.training.checks import unwrapped
from narrowcast.training.float8 import Float8, convert
from narrowcast.training.loss_scale import DynamicScale, NoScale, Scale, StaticScale
from narrowcast.training.overrides import FORMATS, Overrides, cast, run_in

__all__ = ["POLICIES", "Precision", "precision"]

#: What autocast casts products to; policies that compute in anything else run without it.
_CAST = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}
_UPDATES = ("plain", "stochastic", "kahan")
#: What modules have been converted for, where that changed them.
_prepared: WeakKeyDictionary[nn.Module, Precision] = WeakKeyDictionary()


@dataclass(frozen=True)
class Precision:
    """What a training run keeps and computes in.

    Args:
        name: By which it is asked for.
        parameters: What weights are stored in: ``fp32``, or ``bf16`` without FP32 master weights.
        compute: What products and convolutions multiply: ``fp32``, ``tf32``, ``bf16``, ``fp16`` or ``fp8``.
        scale: How losses are scaled.
        update: How BF16 weights are updated, see :mod:`narrowcast.training.rounding`; ``plain`` elsewhere.
        overrides: Patterns of module names (as in :mod:`fnmatch`) and what these modules run in instead; the last that
            fits counts.
        float8: How products are cast to FP8, with ``compute="fp8"``.
    """

    name: str
    parameters: Literal["fp32", "bf16"] = "fp32"
    compute: Literal["fp32", "tf32", "bf16", "fp16", "fp8"] = "fp32"
    scale: Scale = field(default_factory=NoScale)
    update: Literal["plain", "stochastic", "kahan"] = "plain"
    overrides: Overrides = ()
    float8: Float8 | None = None

    @property
    def mixed(self) -> bool:
        """Whether autocast casts FP32 weights for each use."""
        return self.parameters == "fp32" and self.compute in _CAST

    @property
    def preparation(self) -> tuple[object, ...]:
        """What a module is prepared for; loss scales and updates leave it as it is."""
        return self.parameters, self.compute, self.overrides, self.float8

    def check(self, device: torch.device) -> None:
        """Check that a device computes in it.

        Raises:
            DeviceError: It does not; the message says what it has and what to use.
        """
        if device.type not in ("cpu", "cuda"):
            raise DeviceError(f"training on a {device.type} device", allowed="cpu, cuda")
        if self.compute == "tf32" and (device.type == "cpu" or _capability(device) < (8, 0)):
            raise DeviceError(
                f"precision tf32 on {_described(device)}, which has no TF32",
                allowed="CUDA devices of capability 8.0 or more",
                next_step="use fp32" + ("" if device.type == "cuda" else ", or bf16-mixed"),
            )
        if self.compute == "bf16" and device.type == "cuda" and _capability(device) < (8, 0):
            raise DeviceError(
                f"precision {self.name} on {_described(device)}, which multiplies no BF16",
                allowed="CUDA devices of capability 8.0 or more, or the CPU",
                next_step="use fp16-mixed",
            )
        if self.float8 is not None and not (self.float8.emulate or _multiplies_fp8(device)):
            raise DeviceError(
                f"precision {self.name} on {_described(device)}, which multiplies no FP8",
                allowed="CUDA devices of capability 8.9 or more (Ada, Hopper, Blackwell)",
                next_step="use bf16-mixed",
            )

    def prepare(self, module: nn.Module) -> nn.Module:
        """Cast and convert a module in place, and have the modules that an override names run in its format.

        Parameters stay the same objects, so an optimizer that was made before goes on with them. A module that has been
        prepared for this policy is left as it is: prepare it before it is compiled, replicated or sharded.

        Raises:
            FormatError: A pattern names no module, or the module has been prepared for another policy.
        """
        inner = unwrapped(module)
        before = _prepared.get(inner)
        if before is None:
            if self.parameters == "bf16":
                inner.to(torch.bfloat16)
            if self.float8 is not None:
                convert(inner, self.float8, self.overrides)
            run_in(inner, self.overrides, base=self.compute, stored=self.parameters)
            if self.parameters == "bf16" or self.float8 is not None or self.overrides:
                _prepared[inner] = self
        elif before.preparation != self.preparation:
            raise FormatError(
                f"a module that was prepared for precision {before.name} is to train in {self.name}"
                + (" with other formats" if before.name == self.name else ""),
                next_step="build the module anew and load its weights",
            )
        return module

    def inputs(self, inputs: Any) -> Any:
        """Return a module's inputs in what it is stored in: BF16 weights do not multiply FP32 inputs."""
        return cast(inputs, torch.bfloat16) if self.parameters == "bf16" else inputs

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """Return the context that the forward pass and the loss run in."""
        if not self.mixed:
            return nullcontext()
        casting = torch.autocast(device.type, dtype=_CAST[self.compute])
        if torch.compiler.is_dynamo_compiling():  # this is part of what is compiled, and a setting cannot be
            return casting
        return self._cached_apart(casting)

    @contextmanager
    def _cached_apart(self, casting: AbstractContextManager[object]) -> Generator[None]:
        """Cast, and have what is compiled meanwhile cached for this policy alone.

        PyTorch 2.11 does not look at the type when it looks for compiled code: FP16 would run what BF16 left on disk.
        """
        before = compilation.cache_key_tag
        compilation.cache_key_tag = f"{before} {self.compute} {self.overrides}".lstrip()
        try:
            with casting:
                yield
        finally:
            compilation.cache_key_tag = before

    @contextmanager
    def running(self, device: torch.device) -> Generator[None]:
        """Set whether CUDA multiplies FP32 numbers in TF32, for forward and backward passes, and put it back afterwards.

        Products and convolutions alike: PyTorch's own default is TF32 for convolutions alone.
        """
        if device.type != "cuda":
            yield
            return
        wanted = self.compute == "tf32"
        products: Any = torch.backends.cuda.matmul
        convolutions: Any = torch.backends.cudnn
        before = products.allow_tf32, convolutions.allow_tf32
        products.allow_tf32 = convolutions.allow_tf32 = wanted
        try:
            yield
        finally:
            products.allow_tf32, convolutions.allow_tf32 = before


#: The policies; each may be changed in what :func:`precision` takes.
POLICIES: dict[str, Precision] = {
    entry.name: entry
    for entry in (
        Precision("fp32"),
        Precision("tf32", compute="tf32"),
        Precision("bf16-mixed", compute="bf16"),
        Precision("fp16-mixed", compute="fp16", scale=DynamicScale()),
        Precision("bf16-true", parameters="bf16", compute="bf16", update="stochastic"),
        Precision("fp8-mixed", compute="fp8", float8=Float8()),
    )
}


def precision(
    name: str | Precision,
    *,
    loss_scale: Literal["dynamic", "off"] | float | Scale | None = None,
    overrides: Mapping[str, str] | None = None,
    update: Literal["plain", "stochastic", "kahan"] | None = None,
    float8: Float8 | None = None,
) -> Precision:
    """Return a policy by its name, with what is changed in it.

    Args:
        name: One of :data:`POLICIES`, or a policy.
        loss_scale: ``dynamic``, ``off``, a number that stays, or a scale; the policy's own unless given.
        overrides: Formats by patterns of module names, such as ``{"head*": "fp32"}``; the last that fits counts.
        update: How BF16 weights are updated: ``stochastic``, ``kahan`` or ``plain``; only with ``bf16-true``.
        float8: Scaling and formats of FP8 products; only with ``fp8-mixed``.

    Raises:
        FormatError: An unknown policy or format, ``fp16-true``, or a setting that the policy has no use for.
    """
    policy = name if isinstance(name, Precision) else _by_name(name)
    if loss_scale is not None:
        policy = replace(policy, scale=_scale(loss_scale))
    if overrides:
        for pattern, format in overrides.items():
            _check_override(policy, pattern, format)
        policy = replace(policy, overrides=(*policy.overrides, *overrides.items()))
    if update is not None:
        if policy.parameters != "bf16" or update not in _UPDATES:
            raise FormatError(
                f"update {update!r} with precision {policy.name}",
                allowed="stochastic, kahan or plain, with bf16-true",
                next_step="the other policies keep FP32 weights, which lose no updates",
            )
        policy = replace(policy, update=update)
    if float8 is not None:
        if policy.float8 is None:
            raise FormatError(f"FP8 settings with precision {policy.name}", allowed="fp8-mixed")
        policy = replace(policy, float8=float8)
    return policy


def _by_name(name: str) -> Precision:
    key = name.strip().casefold().replace("_", "-")
    if key == "fp16-true":
        raise FormatError(
            "precision 'fp16-true' is refused: FP16 weights lose updates below 2^-11 of the weight, Adam's second moments "
            "vanish below 2^-24, and no loss scale mends either",
            allowed=", ".join(POLICIES),
            next_step="use fp16-mixed (FP32 weights, FP16 products), or bf16-true to halve the weights' memory",
        )
    if key not in POLICIES:
        raise FormatError(f"precision {name!r} is unknown", allowed=choices(key, POLICIES))
    return POLICIES[key]


def _scale(given: Literal["dynamic", "off"] | float | Scale) -> Scale:
    if isinstance(given, str):
        named = {"dynamic": DynamicScale(), "off": NoScale()}
        if given not in named:
            raise FormatError(f"loss scale {given!r} is unknown", allowed="dynamic, off, or a number such as 1024")
        return named[given]
    return StaticScale(float(given)) if isinstance(given, int | float) else given


def _check_override(policy: Precision, pattern: str, format: str) -> None:
    allowed = FORMATS if policy.compute == "fp8" else tuple(one for one in FORMATS if one != "fp8")
    if format not in allowed:
        raise FormatError(
            f"override {pattern!r} asks for {format!r} in precision {policy.name}", allowed=choices(format, allowed)
        )


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _multiplies_fp8(device: torch.device) -> bool:
    return device.type == "cuda" and _capability(device) >= (8, 9)


def _described(device: torch.device) -> str:
    if device.type == "cpu":
        return "the CPU"
    major, minor = _capability(device)
    return f"{torch.cuda.get_device_name(device)} (capability {major}.{minor})"

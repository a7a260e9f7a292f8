"""Memory: what a model needs for inference or a training step, by what the bytes hold.

The run is traced with shapes in place of numbers, and every storage is followed from its allocation to its end. The most
bytes alive at one moment are the peak, and its parts add up to it.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, Protocol, TypedDict, Unpack

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from narrowcast.accounting.building import dtype_of, fake_module
from narrowcast.accounting.lives import Life, Lives
from narrowcast.accounting.packing import packed_sizes
from narrowcast.accounting.policies import POLICIES
from narrowcast.accounting.policies import policy as named_policy
from narrowcast.accounting.sharding import Sharding, communication, largest_unit
from narrowcast.accounting.sharding import sharding as named_sharding
from narrowcast.accounting.sources import GraphSource
from narrowcast.accounting.step import DTYPES, Setting, inference, placed, training
from narrowcast.errors import ModelError

__all__ = ["PARTS", "Buildable", "Memory", "MemoryOptions", "memory", "memory_of_module"]

#: What bytes hold, in the order of reports.
PARTS = ("data", "weights", "master", "gradients", "optimizer_state", "activations", "temporary")

_STEP = "optimizer step"  # what it makes for a moment; reported with what is temporary


class Memory(BaseModel):
    """Bytes on one device. The parts from ``data`` to ``workspace`` are those alive at the peak, and add up to it.

    Args:
        model: As the user gave it.
        mode: ``infer`` or ``train``.
        policy: Number formats, by the policy's name.
        device: ``cpu`` or ``cuda``.
        optimizer: Its name; empty for inference.
        devices: Devices that the work is spread over.
        sharding: How.
        data: Inputs.
        weights: Parameters and buffers as products read them: under autocast the copies in half precision, and what was
            not copied.
        master: Parameters that are kept in full precision beside the weights.
        gradients: Of parameters, as they are kept for the optimizer.
        optimizer_state: States of the optimizer.
        activations: Results of forward that backward needs.
        temporary: All other results: gradients of activations, what one operator hands to the next.
        kv_cache: Keys and values of past tokens, as given.
        communication: Buckets of gradients, or gathered weights.
        workspace: What libraries allocate for themselves.
        peak: The sum; for training, that of a step that finds the optimizer's states already there.
        first_peak: The peak of the very first step, which makes them; equals ``peak`` for inference.
        when: The operator at the peak, with its phase and module.
        most: The most bytes of each part at any moment, which need not be the peak.
        moments: Bytes alive at named points of the run on one device, what libraries keep included.
        timeline: Bytes alive after each operator of the step, and its phase; no part of the JSON.
    """

    model_config = ConfigDict(frozen=True)

    model: str
    mode: Literal["infer", "train"]
    policy: str
    device: str
    optimizer: str
    devices: int
    sharding: str
    data: int
    weights: int
    master: int
    gradients: int
    optimizer_state: int
    activations: int
    temporary: int
    kv_cache: int
    communication: int
    workspace: int
    peak: int
    first_peak: int
    when: str
    most: dict[str, int]
    moments: dict[str, int]
    timeline: tuple[tuple[int, str], ...] = Field(exclude=True, repr=False)

    @property
    def parts(self) -> dict[str, int]:
        """Bytes of each part at the peak."""
        names = (*PARTS, "kv_cache", "communication", "workspace")
        return {name: getattr(self, name) for name in names}


class Buildable(Protocol):
    """A model that can be built, and example inputs, as :class:`narrowcast.accounting.sources.Source` is."""

    @property
    def name(self) -> str: ...

    @property
    def build(self) -> Callable[[], nn.Module]: ...

    @property
    def examples(self) -> Callable[[], tuple[Any, ...]]: ...

    @property
    def named(self) -> Callable[[], dict[str, Any]]: ...


class MemoryOptions(TypedDict, total=False):
    """What memory depends on beside the model and its inputs; in brackets what holds unless given.

    Args:
        policy: Number formats, see :mod:`narrowcast.accounting.policies` (``fp32``).
        mode: ``infer`` for one run without gradients, ``train`` for a training step (``infer``).
        optimizer: One of :data:`narrowcast.accounting.optimizers.OPTIMIZERS` (``adamw``).
        accumulate: Backward passes for each step of the optimizer, of the source's batch each (1).
        checkpoint: Whether repeated blocks are computed again in backward; or a pattern of module names (not).
        devices: Devices that the work is spread over; the source's batch is that of one (1).
        sharding: One of :data:`narrowcast.accounting.sharding.SHARDINGS` (``replicated``).
        device: Whose kernels and allocator are followed: ``cpu`` or ``cuda`` (``cpu``).
        capability: CUDA's compute capability (8.0).
        kv_cache: Bytes of keys and values of past tokens that are held beside (0).
        loss: What backward starts from (the model's own loss, or the sum of its outputs).
    """

    policy: str
    mode: Literal["infer", "train"]
    optimizer: str
    accumulate: int
    checkpoint: bool | str
    devices: int
    sharding: str
    device: Literal["cpu", "cuda"]
    capability: tuple[int, int]
    kv_cache: int
    loss: Callable[[Any], torch.Tensor] | None


@dataclass(frozen=True)
class _Asked:
    """The options, all of them, and what they name; refuses names and numbers that cannot be used."""

    policy: str = "fp32"
    mode: Literal["infer", "train"] = "infer"
    optimizer: str = "adamw"
    accumulate: int = 1
    checkpoint: bool | str = False
    devices: int = 1
    sharding: str = "replicated"
    device: Literal["cpu", "cuda"] = "cpu"
    capability: tuple[int, int] = (8, 0)
    kv_cache: int = 0
    loss: Callable[[Any], torch.Tensor] | None = None

    def __post_init__(self) -> None:
        _ = self.setting, self.spread

    @property
    def trains(self) -> bool:
        return self.mode == "train"

    @cached_property
    def setting(self) -> Setting:
        """How the model runs.

        Raises:
            ModelError: A name or number cannot be used.
            FormatError: There is no such policy.
        """
        chosen = named_policy(self.policy)
        if self.mode not in ("infer", "train"):
            raise ModelError(f"mode {self.mode!r}", allowed="infer, train")
        if self.device not in ("cpu", "cuda"):
            raise ModelError(f"memory on {self.device!r} cannot be followed", allowed="cpu, cuda")
        if self.accumulate < 1:
            raise ModelError(f"accumulate = {self.accumulate}", allowed="1 or more backward passes for each step")
        if self.trains and not chosen.trains:
            allowed = ", ".join(entry.name for entry in POLICIES.values() if entry.trains)
            raise ModelError(f"nobody trains in {chosen.name}, which is for inference", allowed=allowed)
        return Setting(chosen, self.device, self.capability, self.optimizer, self.accumulate, self.checkpoint)

    @cached_property
    def spread(self) -> Sharding:
        """How the work is spread over devices.

        Raises:
            ModelError: There is no such way, or no device.
        """
        how = named_sharding(self.sharding)
        if self.devices < 1:
            raise ModelError(f"devices = {self.devices}", allowed="1 or more")
        return how


def memory(source: Buildable, **options: Unpack[MemoryOptions]) -> Memory:
    """Return the memory that a model needs on each device.

    Args:
        source: The model and its inputs.
        options: See :class:`MemoryOptions`.

    Raises:
        ModelError: The source is an ONNX graph, the inputs do not fit, the run depends on numbers, or a name or number
            cannot be used.
        FormatError: There is no such policy.
    """
    if isinstance(source, GraphSource):
        raise ModelError(
            f"memory of {source.name} cannot be followed: an ONNX graph says nothing of a runtime's allocator",
            allowed="PyTorch modules: timm:, torchvision:, py:, bundled:, hf:",
            next_step="give the module that it was exported from, or take peak_bytes of its profile",
        )
    asked = _Asked(**options)
    before = torch.get_default_dtype()
    torch.set_default_dtype(asked.setting.dtype)
    try:
        module, fake = fake_module(source.build)
    finally:
        torch.set_default_dtype(before)
    return _counted(_run(module, fake, source.examples(), source.named(), asked), source.name, asked)


def memory_of_module(
    module: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    name: str = "",
    **options: Unpack[MemoryOptions],
) -> Memory:
    """Return the memory of a module that is there already, which is left as it is; see :func:`memory`.

    Its tensors keep the dtypes that they have, so that it must have been built in the policy's.

    Args:
        module: Real or with shapes in place of numbers.
        args: Example inputs; only shapes and dtypes matter.
        kwargs: Likewise, by name.
        name: What the result calls it; its class unless given.
        options: See :class:`MemoryOptions`.

    Raises:
        ModelError: As for :func:`memory`.
        FormatError: There is no such policy.
    """
    asked = _Asked(**options)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    return _counted(_run(module, fake, args, kwargs or {}, asked), name or type(module).__name__, asked)


class _Followed(NamedTuple):
    """A run, and what closed forms need of its module."""

    lives: Lives
    gradients: int
    unit: int


def _run(
    module: nn.Module, fake: FakeTensorMode, args: Sequence[Any], kwargs: Mapping[str, Any], asked: _Asked
) -> _Followed:
    setting = asked.setting
    _check_dtype(module, setting)
    module = placed(module, fake, setting)
    if asked.trains:
        lives = training(module, fake, args, kwargs, setting, asked.loss)
    else:
        lives = inference(module, fake, args, kwargs, setting, packed_sizes(module, setting.policy))
    trained = [tensor for tensor in module.parameters() if tensor.requires_grad]
    gradients = sum(tensor.numel() * tensor.element_size() for tensor in trained) if asked.trains else 0
    return _Followed(
        lives, gradients, largest_unit(module, DTYPES.get(setting.policy.compute, torch.bfloat16).itemsize)
    )


def _check_dtype(module: nn.Module, setting: Setting) -> None:
    """Make sure that a module is in the format that a policy keeps parameters in.

    Raises:
        ModelError: It is in another one, whatever it was built under.
    """
    own = dtype_of(module)
    if own is None or own is setting.dtype:
        return
    fitting = [entry.name for entry in POLICIES.values() if DTYPES[entry.rest] is own]
    raise ModelError(
        f"the module is in {str(own).removeprefix('torch.')}, and {setting.policy.name} keeps its parameters in "
        f"{setting.policy.rest}",
        allowed=", ".join(fitting),
        next_step="take one of these, or have the model built without a dtype of its own",
    )


def _counted(run: _Followed, model: str, asked: _Asked) -> Memory:
    setting = asked.setting
    lives = run.lives
    table = _table(lives)
    divided = set(asked.spread.divided)
    if "optimizer_state" in divided:  # each device steps for its share, on its share of master weights
        divided |= {_STEP} | ({"master"} if setting.policy.master else set())
    for row, part in enumerate((*PARTS, _STEP)):
        if part in divided:
            table[row] = -(-table[row] // asked.devices)
    table[PARTS.index("temporary")] += table[-1]
    table = table[:-1]
    hidden = np.array([moment.hidden for moment in lives.moments] or [0], dtype=np.int64)
    kept = setting.backend.kept * (2 if asked.trains else 1)  # backward runs in a thread of its own
    beside = communication(asked.spread, asked.devices, run.gradients, run.unit)
    live = table.sum(axis=0) + kept + beside + asked.kv_cache
    total = live + hidden
    start = next(
        (place for name, place, _ in lives.marks if name == "first step"), 0
    )  # the second step is what all later ones are
    peak = start + int(total[start:].argmax())
    moment = lives.moments[peak]
    at_peak = dict(zip(PARTS, map(int, table[:, peak]), strict=True))
    return Memory(
        model=model,
        mode=asked.mode,
        policy=setting.policy.name,
        device=setting.device,
        optimizer=setting.optimizer if asked.trains else "",
        devices=asked.devices,
        sharding=asked.spread.name,
        **at_peak,
        kv_cache=asked.kv_cache,
        communication=beside,
        workspace=kept + int(hidden[peak]),
        peak=int(total[peak]),
        first_peak=int(total[: start or None].max()),
        when=f"{moment.name} ({moment.phase}{', ' + moment.path if moment.path else ''})",
        most=dict(zip(PARTS, map(int, table[:, start:].max(axis=1)), strict=True)),
        moments={key: size + kept for key, _, size in lives.marks},
        timeline=tuple(
            (int(size), moment.phase) for size, moment in zip(live[start:], lives.moments[start:], strict=True)
        ),
    )


def _table(lives: Lives) -> np.ndarray:
    """Return the bytes alive by part, and what the optimizer's step makes for a moment, int64 ``[parts + 1, operators]``."""
    count = max(len(lives.moments), 1)
    table = np.zeros((len(PARTS) + 1, count + 1), dtype=np.int64)
    rows = {part: row for row, part in enumerate((*PARTS, _STEP))}
    backward = [place for place, moment in enumerate(lives.moments) if moment.phase == "backward"]
    for life in lives.storages:
        row = rows[life.role or _part(life, lives, backward)]
        table[row, min(life.born, count)] += life.bytes
        if life.died is not None:
            table[row, min(life.died, count)] -= life.bytes
    return table.cumsum(axis=1)[:, :count]


def _part(life: Life, lives: Lives, backward: list[int]) -> str:
    """Return what a result is: kept for backward if forward made it and the first operator of backward finds it."""
    phase = lives.moments[life.born].phase if life.born < len(lives.moments) else ""
    if phase != "forward":
        return _STEP if phase == "optimizer" else "temporary"
    after = bisect.bisect(backward, life.born)
    kept = after < len(backward) and (life.died is None or life.died > backward[after])
    return "activations" if kept else "temporary"

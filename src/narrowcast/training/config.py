"""What a training run is: validated data, written as YAML.

A config is read by :mod:`narrowcast.training.reading`, which names mistakes by file and key. Each section may be given by
its first key alone: ``network: bundled:mnist-cnn`` is ``network: {name: bundled:mnist-cnn}``.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Strict,
    Tag,
    model_validator,
)

__all__ = [
    "Adam",
    "AdamW",
    "Augment",
    "Checkpoints",
    "Config",
    "Data",
    "Distill",
    "FeaturePair",
    "Float8Settings",
    "LogSettings",
    "LossSettings",
    "Network",
    "PrecisionSettings",
    "Range",
    "Scale",
    "Schedule",
    "Section",
    "Sgd",
    "Tune",
]


def _number(value: Any) -> Any:
    """Return the number of a text such as 1e-3, which YAML 1.1 does not read as one."""
    if isinstance(value, str) and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", value.strip()):
        return float(value)
    return value


def _bound(value: Any) -> Any:
    number = _number(value)
    if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
        raise ValueError(f"{value!r} is no number")
    return number


def _off(value: Any) -> Any:
    """Return ``off`` for what YAML 1.1 makes of it."""
    return "off" if value is False else value


Whole = Annotated[int, Strict()]
Real = Annotated[float, BeforeValidator(_number), Strict(), Field(allow_inf_nan=False)]
Flag = Annotated[bool, Strict()]
Text = Annotated[str, Strict(), Field(min_length=1)]
Share = Annotated[Real, Field(ge=0, le=1)]


class Section(BaseModel):
    """A part of the config: frozen, without unknown keys, and given by its first key alone where one value says it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    #: The key that a section given as a single value sets; empty where there is none.
    first: ClassVar[str] = "name"

    @model_validator(mode="before")
    @classmethod
    def _of_one_value(cls, given: Any) -> Any:
        return {cls.first: given} if cls.first and isinstance(given, str | int | float | bool | list) else given


class Network(Section):
    """The network that is trained."""

    name: Text = Field(
        description="Reference: `bundled:NAME`, `timm:NAME`, `torchvision:NAME`, `py:MODULE:FUNCTION`, all with fresh "
        "weights; or the folder of an earlier run, which goes on from its weights."
    )
    arguments: dict[str, Any] = Field(
        default={}, description="Keyword arguments of the constructor or function, for example `{num_classes: 10}`."
    )
    input: tuple[Annotated[Whole, Field(ge=1)], ...] | None = Field(
        default=None,
        description="Shape of one sample, for example `[1, 28, 28]`, for timm and torchvision; their own unless given.",
    )


class Augment(Section):
    """What training images go through, drawn by seed; nothing by default."""

    first: ClassVar[str] = ""

    shift: Annotated[Whole, Field(ge=0)] = Field(default=0, description="Largest shift along either axis, in pixels.")
    flip: Flag = Field(default=False, description="Whether half of the images are mirrored left to right.")
    noise: Annotated[Real, Field(ge=0)] = Field(default=0.0, description="Standard deviation of added Gaussian noise.")


class Data(Section):
    """What is learnt from, and what tells how well."""

    first: ClassVar[str] = "train"

    train: Text = Field(
        description="Data reference as `narrowcast optimize` takes it: `bundled:NAME`, `npz:FILE`, `imagefolder:DIR`, "
        "`py:MODULE:FUNCTION`."
    )
    validation: Text | None = Field(
        default=None, description="Data reference of the validation part, only with `data.report`."
    )
    report: Text | None = Field(
        default=None,
        description="Data reference of the report part. Unless given, `data.train` is split in three as `narrowcast "
        "optimize` does it: the calibration part is trained on, the search part validates, the report part reports.",
    )
    split_seed: Annotated[Whole, Field(ge=0)] = Field(
        default=0, description="Seed of the split: the `--seed` of a later `narrowcast optimize`."
    )
    targets: Text = Field(
        default="labels", description="What the loss compares with: `labels`, or the name of an array of the data."
    )
    augment: Augment = Field(default=Augment(), description="Random changes of the images that are trained on.")


class LossSettings(Section):
    """What is minimised."""

    name: Text = Field(
        default="cross-entropy",
        description="`cross-entropy` of class indices; `next-token` of token sequences, the mean over tokens; `mse`; or "
        "`py:MODULE:FUNCTION`, a function of outputs and targets that returns the mean, or a `narrowcast.training.Loss`.",
    )
    label_smoothing: Share = Field(default=0.0, description="Share of a label that goes to all classes alike.")
    ignore: Whole = Field(default=-100, description="Label of what is not learnt from, such as padding.")


class _Optimizer(Section):
    lr: Annotated[Real, Field(gt=0)] = Field(default=1e-3, description="Largest learning rate.")
    weight_decay: Annotated[Real, Field(ge=0)] = Field(default=0.0, description="Weight decay.")


class _Betas(_Optimizer):
    betas: tuple[Share, Share] = Field(default=(0.9, 0.999), description="Decay of the first and the second moment.")
    eps: Annotated[Real, Field(gt=0)] = Field(default=1e-8, description="Added to the root of the second moment.")


class AdamW(_Betas):
    """AdamW: weight decay beside the gradient (Loshchilov and Hutter, 2019)."""

    name: Literal["adamw"] = Field(default="adamw", description="The optimizer.")
    weight_decay: Annotated[Real, Field(ge=0)] = Field(default=0.01, description="Weight decay.")


class Adam(_Betas):
    """Adam (Kingma and Ba, 2015)."""

    name: Literal["adam"] = Field(default="adam", description="The optimizer.")


class Sgd(_Optimizer):
    """Stochastic gradient descent, with momentum."""

    name: Literal["sgd"] = Field(default="sgd", description="The optimizer.")
    momentum: Share = Field(default=0.9, description="Momentum; 0 for none.")
    nesterov: Flag = Field(default=False, description="Whether momentum looks ahead.")


OPTIMIZERS: dict[str, type[_Optimizer]] = {"adamw": AdamW, "adam": Adam, "sgd": Sgd}


def _tag(value: Any) -> str | None:
    name = value if isinstance(value, str) else value.get("name", "adamw") if isinstance(value, dict) else value.name
    return name if name in OPTIMIZERS else None


AnyOptimizer = Annotated[
    Annotated[AdamW, Tag("adamw")] | Annotated[Adam, Tag("adam")] | Annotated[Sgd, Tag("sgd")],
    Discriminator(
        _tag,
        custom_error_type="optimizer",
        custom_error_message=f"no such optimizer; allowed: {', '.join(OPTIMIZERS)}",
    ),
]


class Schedule(Section):
    """How the learning rate moves: up to `optimizer.lr`, then down to a share of it."""

    name: Literal["constant", "linear", "cosine"] = Field(default="cosine", description="Shape of the way down.")
    warmup: Share = Field(default=0.05, description="Share of all steps in which the rate rises from almost nothing.")
    final: Share = Field(default=0.0, description="Share of the rate that is left at the end.")


class Scale(Section):
    """Loss scaling; what is not given is as the policy has it (`narrowcast.training.DynamicScale`)."""

    first: ClassVar[str] = "kind"

    kind: Annotated[Literal["dynamic", "static", "off"], BeforeValidator(_off)] = Field(
        default="dynamic",
        description="Whether the scale moves, stays, or is not there; a number alone is a static one.",
    )
    initial: Annotated[Real, Field(gt=0)] | None = Field(default=None, description="Scale of the first step.")
    growth: Annotated[Real, Field(ge=1)] | None = Field(default=None, description="Factor after `interval` good steps.")
    backoff: Annotated[Real, Field(gt=0, lt=1)] | None = Field(default=None, description="Factor after an overflow.")
    interval: Annotated[Whole, Field(ge=1)] | None = Field(default=None, description="Good steps before it grows.")
    hysteresis: Annotated[Whole, Field(ge=1)] | None = Field(default=None, description="Overflows before it backs off.")
    floor: Annotated[Real, Field(gt=0)] | None = Field(default=None, description="Never below.")
    cap: Annotated[Real, Field(gt=0)] | None = Field(default=None, description="Never above.")

    @model_validator(mode="before")
    @classmethod
    def _of_a_number(cls, given: Any) -> Any:
        number = _number(given)
        is_number = isinstance(number, int | float) and not isinstance(number, bool)
        return {"kind": "static", "initial": number} if is_number else given

    @model_validator(mode="after")
    def _only_dynamic_moves(self) -> Scale:
        moving = {"growth", "backoff", "interval", "hysteresis", "floor", "cap"} & self.model_fields_set
        if self.kind != "dynamic" and moving:
            raise ValueError(f"{min(moving)} belongs to dynamic scaling, and kind is {self.kind}")
        if self.kind == "static" and self.initial is None:
            raise ValueError("a static scale needs its value: write loss_scale: 1024")
        if self.kind == "off" and self.initial is not None:
            raise ValueError("there is no initial scale where kind is off")
        return self


class Float8Settings(Section):
    """How products are cast to FP8."""

    first: ClassVar[str] = "scaling"

    scaling: Literal["tensorwise", "rowwise"] = Field(
        default="tensorwise", description="One scale for a tensor, or one for each row."
    )
    gradients: Literal["e5m2", "e4m3"] | None = Field(
        default=None, description="What gradients of outputs are cast to; torchao's recipe unless given."
    )
    keep_ends: Flag = Field(default=True, description="Whether the first and the last linear layer stay in BF16.")


class PrecisionSettings(Section):
    """What is computed and kept in which number format."""

    name: Text = Field(
        default="fp32", description="`fp32`, `tf32`, `bf16-mixed`, `fp16-mixed`, `bf16-true` or `fp8-mixed`."
    )
    loss_scale: Scale | None = Field(
        default=None, description="`dynamic`, a number, `off`, or the settings below; the policy's own unless given."
    )
    overrides: dict[str, str] = Field(
        default={},
        description="Format by pattern of module names, for example `{'head': fp32, 'blocks.*.norm': fp32}`.",
    )
    update: Literal["plain", "stochastic", "kahan"] | None = Field(
        default=None, description="How `bf16-true` rounds updates; the policy's own unless given."
    )
    float8: Float8Settings | None = Field(default=None, description="How `fp8-mixed` casts.")


class Checkpoints(Section):
    """When the whole state is written, so that `--resume` goes on from it; also at the end and on Ctrl-C."""

    first: ClassVar[str] = "every"

    every: Annotated[Whole, Field(ge=1)] = Field(default=200, description="Steps between checkpoints.")
    keep: Annotated[Whole, Field(ge=1)] = Field(default=2, description="Checkpoints that are kept.")


class LogSettings(Section):
    """What is written while it trains."""

    first: ClassVar[str] = "every"

    every: Annotated[Whole, Field(ge=1)] = Field(default=10, description="Steps between lines of log.jsonl.")
    tensorboard: Flag = Field(default=False, description="Whether scalars also go to tensorboard/.")


class FeaturePair(Section):
    """A module of the teacher and one of the student, by name or pattern."""

    first: ClassVar[str] = ""

    teacher: Text = Field(description="The teacher's module.")
    student: Text = Field(description="The student's module.")
    weight: Annotated[Real, Field(gt=0)] = Field(default=1.0, description="Weight of this term in the loss.")


class Distill(Section):
    """Knowledge distillation from a trained teacher (Hinton, Vinyals and Dean, 2015)."""

    first: ClassVar[str] = "teacher"

    teacher: Text = Field(description="Reference of the teacher: the folder of a run, or any trained network.")
    temperature: Annotated[Real, Field(gt=0)] = Field(
        default=4.0, description="What both sides' logits are divided by before they are compared."
    )
    alpha: Share = Field(default=0.9, description="Share of the teacher in the loss; the labels have the rest.")
    match: Literal["kl", "mse"] = Field(default="kl", description="Whether classes or plain numbers are compared.")
    features: tuple[FeaturePair, ...] = Field(default=(), description="Modules whose outputs are to agree.")
    precision: Text = Field(default="fp32", description="Precision that the teacher computes in.")
    cache: Flag = Field(
        default=False, description="Whether the teacher's outputs are kept on disk; not with `data.augment`."
    )


class Range(Section):
    """The values that the search may give to a key: a range, or choices."""

    first: ClassVar[str] = "choices"

    low: Annotated[Any, AfterValidator(_bound)] = Field(
        default=None, description="Smallest value; whole numbers are drawn where both ends are written as such."
    )
    high: Annotated[Any, AfterValidator(_bound)] = Field(default=None, description="Largest value.")
    log: Flag = Field(default=False, description="Whether the logarithm is drawn evenly.")
    choices: tuple[Any, ...] | None = Field(default=None, description="The values themselves, in place of a range.")

    @model_validator(mode="after")
    def _one_of_both(self) -> Range:
        if (self.choices is None) == (self.low is None or self.high is None):
            raise ValueError("give low and high, or choices")
        if self.choices is not None and (not self.choices or self.low is not None or self.high is not None):
            raise ValueError("give low and high, or choices that are not empty")
        if self.low is not None and self.high is not None and not self.low < self.high:
            raise ValueError("low must be below high")
        if self.log and (self.low is None or self.low <= 0):
            raise ValueError("the logarithm needs low above 0")
        return self


class Tune(Section):
    """The search for good settings: `narrowcast train CONFIG --tune N`."""

    first: ClassVar[str] = ""

    space: dict[str, Range] = Field(
        default={}, description="Values by key, for example `{optimizer.lr: {low: 1e-4, high: 1e-1, log: true}}`."
    )
    seed: Annotated[Whole, Field(ge=0)] = Field(default=0, description="Seed of what is tried.")
    prune: Flag = Field(
        default=True, description="Whether a trial stops early that is below the median of the others at that step."
    )


class Config(Section):
    """A training run."""

    first: ClassVar[str] = ""

    network: Network = Field(description="The network that is trained.")
    data: Data = Field(description="What is learnt from, and what tells how well.")
    loss: LossSettings = Field(default=LossSettings(), description="What is minimised.")
    metric: Text | None = Field(
        default=None,
        description="What is validated and reported: a metric of `narrowcast optimize`, or `loss`. Default: `top1` with "
        "labels, else `loss`.",
    )
    optimizer: AnyOptimizer = Field(default=AdamW(), description="The optimizer.")
    schedule: Schedule = Field(default=Schedule(), description="How the learning rate moves.")
    batch: Annotated[Whole, Field(ge=1)] = Field(
        default=64, description="Samples of one forward pass, over all processes together."
    )
    accumulate: Annotated[Whole, Field(ge=1)] = Field(default=1, description="Batches for each step of the optimizer.")
    epochs: Annotated[Whole, Field(ge=1)] | None = Field(default=None, description="Passes over the training part.")
    steps: Annotated[Whole, Field(ge=1)] | None = Field(default=None, description="Steps, in place of `epochs`.")
    clip_norm: Annotated[Real, Field(gt=0)] | None = Field(
        default=None, description="Largest norm of all gradients together; longer ones are scaled down to it."
    )
    precision: PrecisionSettings = Field(default=PrecisionSettings(), description="Number formats and loss scaling.")
    nonfinite: Literal["raise", "skip"] = Field(
        default="raise",
        description="What a loss or gradient that is not finite does where there is no loss scaling: end the run, or leave "
        "the update out.",
    )
    seed: Annotated[Whole, Field(ge=0)] = Field(
        default=0, description="Seed of the weights, the order, the augmentation and everything random."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="`auto` is `cuda` where there is one.")
    threads: Annotated[Whole, Field(ge=1)] | None = Field(
        default=None, description="Threads on the CPU; PyTorch's own choice unless given."
    )
    ranks: Literal["replicated", "sharded"] = Field(
        default="replicated",
        description="What several processes (torchrun) hold: each the whole model, or a part of it.",
    )
    validate_every: Annotated[Whole, Field(ge=1)] | None = Field(
        default=None, description="Steps between validations; each epoch unless given."
    )
    checkpoint: Checkpoints = Field(default=Checkpoints(), description="When the state is written.")
    log: LogSettings = Field(default=LogSettings(), description="What is written while it trains.")
    doctor: Annotated[Literal["off", "cheap", "deep"], BeforeValidator(_off)] = Field(
        default="cheap", description="How closely the numbers are watched; see `narrowcast doctor`."
    )
    distill: Distill | None = Field(default=None, description="A teacher, where one is learnt from.")
    tune: Tune | None = Field(default=None, description="The search for good settings.")

    @model_validator(mode="after")
    def _length(self) -> Config:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give one of epochs and steps")
        return self

    @model_validator(mode="after")
    def _parts(self) -> Config:
        if self.data.validation is not None and self.data.report is None:
            raise ValueError("data.validation needs data.report: without it, data.train is split in three")
        return self

"""From a config to everything that a training loop needs, in one value."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from narrowcast.errors import DeviceError
from narrowcast.models.runs import Architecture
from narrowcast.training import fused
from narrowcast.training.config import Adam as AdamSettings
from narrowcast.training.config import AdamW, Config, PrecisionSettings, Scale, Schedule, Sgd
from narrowcast.training.distillation import Distillation
from narrowcast.training.feeding import Batch, Feeder, Parts, Place, in_order, parts_of
from narrowcast.training.float8 import Float8
from narrowcast.training.loss_scale import DynamicScale, NoScale, StaticScale
from narrowcast.training.loss_scale import Scale as LossScale
from narrowcast.training.networks import inputs_of, parameters_of, trainable, trained
from narrowcast.training.objectives import Measure, Result, loss_of, measure_of
from narrowcast.training.policies import Precision, precision
from narrowcast.training.window import Loss

__all__ = ["Assembled", "assemble", "device_of", "factor", "policy_of"]


@dataclass(frozen=True)
class Assembled:
    """What a run consists of, before anything is written.

    Attributes:
        config: The config.
        architecture: What the network is.
        network: The network itself, on the device: what is saved at the end.
        names: Its inputs.
        parts: The data.
        feeder: Batches of the training part.
        policy: Number formats.
        measure: What the network is judged by.
        distillation: The teacher's part of the loss; None without one.
        windows: Updates that are planned, if none is left out.
        place: The device and this process.
    """

    config: Config
    architecture: Architecture
    network: nn.Module
    names: list[str]
    parts: Parts
    feeder: Feeder
    policy: Precision
    measure: Measure
    distillation: Distillation | None
    windows: int
    place: Place

    @property
    def parameters(self) -> int:
        """Parameters that are trained."""
        return parameters_of(self.network)

    @property
    def batches(self) -> int | None:
        """Batches in all; None where only updates are counted."""
        return None if self.config.epochs is None else self.config.epochs * self.feeder.per_epoch

    def example(self) -> Any:
        """Return the inputs of two samples, on the device."""
        few = self.parts.train.take(self.feeder.indices(0)[:2])
        targets = self.config.data.targets
        return next(in_order(few, self.names, targets, size=2, device=self.place.device)).inputs

    def taught(self, batch: Batch) -> tuple[Any, Any]:
        """Return a batch as the trainer takes it, with what the teacher says of it where there is one."""
        if self.distillation is None:
            return batch.inputs, batch.targets
        return self.distillation.batch(batch.inputs, batch.targets, batch.samples)

    def score(self, module: nn.Module, part: str, within: AbstractContextManager[object] | None = None) -> Result:
        """Return the score of a module on the part ``validation`` or ``report``."""
        data = getattr(self.parts, part)
        batches = in_order(data, self.names, self.config.data.targets, size=self.config.batch, device=self.place.device)
        return self.measure(module, batches, data, within)


def assemble(config: Config, place: Place) -> Assembled:
    """Return what a config describes; torch's seed is set to the config's.

    Raises:
        ModelError: The network cannot be found, built or trained.
        DataError: The data cannot be read or do not fit.
        ConfigError: Settings contradict the data.
        DeviceError: The device lacks the precision.
        FormatError: The precision contradicts itself.
        MetricError: The metric does not fit.
        RuntimeMissingError: A package that is needed is not installed.
    """
    policy = policy_of(config.precision)
    policy.check(place.device)
    made, architecture = trainable(config.network, seed=config.seed)
    model = inputs_of(made, architecture.name)
    parts = parts_of(config.data, model)
    feeder = Feeder(
        parts.train,
        made.names,
        config.data.targets,
        size=config.batch,
        seed=config.seed,
        augment=config.data.augment,
        place=place,
    )
    loss = loss_of(config.loss)
    network = made.module.to(place.device).train()
    torch.manual_seed(config.seed + place.rank)
    return Assembled(
        config=config,
        architecture=architecture,
        network=network,
        names=made.names,
        parts=parts,
        feeder=feeder,
        policy=policy,
        measure=measure_of(config.metric, config.data.targets, loss),
        distillation=_distillation(config, loss, place.device),
        windows=config.steps or math.ceil((config.epochs or 0) * feeder.per_epoch / config.accumulate),
        place=place,
    )


def device_of(name: str, local_rank: int = 0) -> torch.device:
    """Return the device that a config asks for.

    Raises:
        DeviceError: There is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise DeviceError(
            "device cuda: PyTorch finds no CUDA device here",
            allowed="cpu, or auto, which takes what there is",
            next_step="--set device=cpu",
        )
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank)


def policy_of(settings: PrecisionSettings) -> Precision:
    """Return the precision policy that settings describe.

    Raises:
        FormatError: It is unknown, refused, or has no use for a setting.
    """
    float8 = settings.float8
    return precision(
        settings.name,
        loss_scale=None if settings.loss_scale is None else _loss_scale(settings.loss_scale),
        overrides=settings.overrides,
        update=settings.update,
        float8=None if float8 is None else Float8(float8.scaling, float8.gradients, float8.keep_ends),
    )


def _loss_scale(settings: Scale) -> LossScale:
    if settings.kind == "off":
        return NoScale()
    if settings.kind == "static":
        assert settings.initial is not None
        return StaticScale(settings.initial)
    return DynamicScale(**settings.model_dump(exclude={"kind"}, exclude_none=True))


def optimizer_of(config: Config, parameters: list[nn.Parameter], policy: Precision) -> Optimizer:
    """Return the optimizer that a config describes; the fastest AdamW that there is for the device."""
    settings = config.optimizer
    match settings:
        case AdamW():
            made = fused.adamw(parameters, settings.lr, settings.betas, settings.eps, settings.weight_decay)
            if isinstance(made, fused.FusedAdamW) and policy.parameters == "bf16":
                rounding = "nearest" if policy.update == "plain" else policy.update
                for group in made.param_groups:
                    group.update(rounding=rounding, seed=config.seed)
            return made
        case AdamSettings():
            return Adam(parameters, settings.lr, settings.betas, settings.eps, settings.weight_decay)
        case Sgd():
            return SGD(
                parameters,
                settings.lr,
                momentum=settings.momentum,
                weight_decay=settings.weight_decay,
                nesterov=settings.nesterov,
            )


def schedule_of(settings: Schedule, optimizer: Optimizer, windows: int) -> LambdaLR:
    """Return the learning-rate schedule over so many updates."""
    return LambdaLR(optimizer, lambda step: factor(settings, step, windows))


def factor(settings: Schedule, step: int, windows: int) -> float:
    """Return the share of the largest learning rate with which update ``step`` (from 0) of ``windows`` is made.

    >>> [round(factor(Schedule(name="linear", warmup=0.5), step, 4), 3) for step in range(4)]
    [0.5, 1.0, 1.0, 0.5]
    """
    rising = round(settings.warmup * windows)
    if step < rising:
        return (step + 1) / rising
    if settings.name == "constant":
        return 1.0
    done = min((step - rising) / max(windows - rising, 1), 1.0)
    shape = 1 - done if settings.name == "linear" else (1 + math.cos(math.pi * done)) / 2
    return settings.final + (1 - settings.final) * shape


def _distillation(
    config: Config, loss: Callable[[Any, Any], Tensor | Loss], device: torch.device
) -> Distillation | None:
    settings = config.distill
    if settings is None:
        return None
    return Distillation(
        trained(settings.teacher).to(device),
        temperature=settings.temperature,
        alpha=settings.alpha,
        hard=lambda outputs, labels: _mean(loss(outputs, labels)),
        match=settings.match,
        features=[(pair.teacher, pair.student, pair.weight) for pair in settings.features],
        precision=settings.precision,
    )


def _mean(value: Tensor | Loss) -> Tensor:
    return value.total / value.weight if isinstance(value, Loss) else value

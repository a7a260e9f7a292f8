"""From a config to everything that a training loop needs, in one value."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from narrowcast.data.dataset import Dataset, digest_of
from narrowcast.errors import DeviceError
from narrowcast.models.runs import Architecture
from narrowcast.training import fused
from narrowcast.training.config import Adam as AdamSettings
from narrowcast.training.config import AdamW, Augment, Config, PrecisionSettings, Scale, Schedule, Sgd
from narrowcast.training.distillation import Distillation
from narrowcast.training.distributed import Ranks
from narrowcast.training.features import called, evaluating
from narrowcast.training.feeding import Batch, Feeder, Parts, in_order, load, on_device, parts_of
from narrowcast.training.float8 import Float8
from narrowcast.training.loss_scale import DynamicScale, NoScale, StaticScale
from narrowcast.training.loss_scale import Scale as LossScale
from narrowcast.training.networks import inputs_of, parameters_of, trainable, trained
from narrowcast.training.objectives import Measure, Result, classes_of, loss_of, measure_of
from narrowcast.training.policies import Precision, precision
from narrowcast.training.shortage import answered
from narrowcast.training.teacher_cache import CachedData, TeacherCache, check_augmentation, teacher_hash
from narrowcast.training.window import Loss

__all__ = ["Assembled", "assemble", "device_of", "factor", "policy_of"]


_FEW = 8  # samples from which shapes and sizes of features are read


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
        ranks: The processes and this one's device.
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
    ranks: Ranks

    @property
    def parameters(self) -> int:
        """Parameters that are trained."""
        return parameters_of(self.network)

    @property
    def batches(self) -> int | None:
        """Batches in all; None where only updates are counted."""
        return None if self.config.epochs is None else self.config.epochs * self.feeder.per_epoch

    def is_done(self, steps: int, skipped: int) -> bool:
        """Return whether a run with so many updates, and so many left out, has come as far as the config asks."""
        return (steps if self.config.steps is not None else steps + skipped) >= self.windows

    def example(self) -> Any:
        """Return the inputs of a few samples, on the device."""
        return _example(self.parts.train, self.names, self.config.data.targets, self.ranks.device, _FEW)

    def hashes(self) -> dict[str, str]:
        """Return the SHA-256 of what is learnt from and measured on: each part of the data, and the teacher's weights."""
        found = {name: part.sha256 for name, part in self.parts._asdict().items() if part is not None}
        return found if self.distillation is None else found | {"teacher": teacher_hash(self.distillation.teacher)}

    def source(self, name: str) -> str:
        """Return the reference of something that has a hash."""
        if name == "teacher":
            assert self.config.distill is not None
            return self.config.distill.teacher
        return self.parts._asdict()[name].source

    def taught(self, batch: Batch) -> tuple[Any, Any]:
        """Return a batch as the trainer takes it, with what the teacher says of it where there is one."""
        if self.distillation is None:
            return batch.inputs, batch.targets
        return self.distillation.batch(batch.inputs, batch.targets, batch.samples)

    def keep_teacher(self, folder: Path, note: Callable[[str], None]) -> None:
        """Ask the teacher about all samples once, and look its answers up from then on, where the config asks for it.

        Raises:
            TrainingError: The teacher's answer to a sample is not finite.
            OutputError: The folder cannot be written.
        """
        if self.distillation is None or self.config.distill is None or not self.config.distill.cache:
            return
        part, targets, device = self.parts.train, self.config.data.targets, self.ranks.device

        def inputs(index: Tensor) -> Any:
            wanted = index.numpy()
            return on_device(part, load(part, wanted, "the teacher"), self.names, targets, wanted, device).inputs

        note("asking the teacher about every sample once")
        self.distillation.cache = TeacherCache.fill(
            folder,
            self.distillation,
            CachedData(
                digest_of(part.sha256, part.source, str(self.config.data.split_seed), str(part.size)),
                part.size,
                inputs,
                augmentation=_altered(self.config),
            ),
        )

    def score(self, module: nn.Module, part: Literal["validation", "report"], policy: Precision) -> Result:
        """Return the score of a module on a part of the data.

        Args:
            module: Any network with the same inputs and outputs.
            part: The part.
            policy: What the module computes in.
        """
        data = self.parts.validation if part == "validation" else self.parts.report
        assert data is not None
        batches = in_order(data, self.names, self.config.data.targets, size=self.config.batch, device=self.ranks.device)
        return self.measure(module, batches, data, policy, self.ranks.device)


def assemble(config: Config, ranks: Ranks) -> Assembled:
    """Return what a config describes.

    Raises:
        ModelError: The network cannot be found, built or trained.
        DataError: The data cannot be read, do not fit, or have labels that the network has no output for.
        ConfigError: Settings contradict the data.
        TrainingError: A teacher's outputs are to be kept of inputs that are augmented.
        DeviceError: The device lacks the precision.
        FormatError: The precision contradicts itself.
        MetricError: The metric does not fit.
        RuntimeMissingError: A package that is needed is not installed.
    """
    policy = policy_of(config.precision)
    policy.check(ranks.device)
    made, architecture = trainable(config.network, seed=config.seed)
    model = inputs_of(made, architecture.name)
    network = made.module.to(ranks.device).train()
    parts = parts_of(config.data, model)
    with answered(config, architecture, ranks):
        parts = _matching(parts, network, made.names, config, ranks.device)
    feeder = Feeder(
        parts.train,
        made.names,
        config.data.targets,
        size=config.batch,
        seed=config.seed,
        augment=config.data.augment,
        ranks=ranks,
    )
    loss = loss_of(config.loss)
    return Assembled(
        config=config,
        architecture=architecture,
        network=network,
        names=made.names,
        parts=parts,
        feeder=feeder,
        policy=policy,
        measure=measure_of(config.metric, config.data.targets, loss),
        distillation=_distillation(config, loss, ranks.device),
        windows=config.steps or math.ceil((config.epochs or 0) * feeder.per_epoch / config.accumulate),
        ranks=ranks,
    )


def _matching(parts: Parts, network: nn.Module, names: list[str], config: Config, device: torch.device) -> Parts:
    """Return the parts of the data, which refuse class indices that the network has no output for.

    Raises:
        DataError: A label has none.
    """
    targets = config.data.targets
    with evaluating(network), torch.no_grad():
        classes = classes_of(config.loss, called(network, _example(parts.train, names, targets, device, 2)))
    if classes is None:
        return parts
    return parts._make(None if part is None else classes.checked(part, targets) for part in parts)


def _example(data: Dataset, names: list[str], targets: str, device: torch.device, size: int) -> Any:
    """Return the inputs of the first samples."""
    few = data.take(np.arange(min(size, data.size)))
    return next(in_order(few, names, targets, size=few.size, device=device)).inputs


def device_of(name: str) -> str:
    """Return the kind of device that a config asks for.

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
        return "cpu"
    return "cuda"


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
    if settings.cache:
        check_augmentation(_altered(config))
    return Distillation(
        trained(settings.teacher).to(device),
        temperature=settings.temperature,
        alpha=settings.alpha,
        hard=lambda outputs, labels: _mean(loss(outputs, labels)),
        match=settings.match,
        features=[(pair.teacher, pair.student, pair.weight) for pair in settings.features],
        precision=settings.precision,
    )


def _altered(config: Config) -> str:
    """Return what training inputs go through, in words; empty for nothing."""
    return "" if config.data.augment == Augment() else f"data.augment: {config.data.augment}"


def _mean(value: Tensor | Loss) -> Tensor:
    """Return a loss as a mean; 0 where nothing counts, as the teacher teaches that too."""
    if not isinstance(value, Loss):
        return value
    weight = torch.as_tensor(value.weight, dtype=torch.float32, device=value.total.device)
    return value.total / weight.clamp(min=torch.finfo(torch.float32).tiny)

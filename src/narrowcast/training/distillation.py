"""Knowledge distillation: a student learns from a teacher's outputs and features, beside or instead of labels.

The teacher joins the batch, not the loss, so the loss stays a function of outputs and targets, as ``Trainer`` calls it::

    distillation = Distillation(teacher, temperature=4.0, alpha=0.9, features=[("layer2", "layer1")])
    student = distillation.student(network, images[:2])     # the network itself where no features are asked for
    trainer = Trainer(student, optimizer, distillation)
    for images, labels in data:
        info = trainer.step(distillation.batch(images, labels))

``batch`` runs the teacher, in its own precision and without gradients, and puts what it said beside the labels. With
``distillation.cache = TeacherCache.fill(...)`` it looks that up by sample index instead: `narrowcast.training.teacher_cache`.

The loss is ``(1 - alpha) * hard + alpha * soft + sum(weight * feature)``. ``hard`` compares the student with the labels,
``soft`` with the teacher: ``T**2`` times the Kullback-Leibler divergence of the outputs softened by the temperature T
(G. Hinton, O. Vinyals, J. Dean: Distilling the knowledge in a neural network, 2015, section 2; the factor keeps gradients as
large as those of ``hard``), or the mean squared difference of the logits, which is its limit at a high temperature
(section 2.1). A feature term is the mean squared difference of two features over the teacher's mean square in the example
that ``student`` is given, the student's projected by a learned linear layer where the widths differ (A. Romero et al.:
FitNets, 2015, equation 3). All terms are means over samples: what a batch comes to does not depend on how it is shared among
micro-batches or processes.

Classes lie where channels lie: see `narrowcast.training.features`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from narrowcast.errors import TrainingError, choices
from narrowcast.training.classes import cross_entropy_sum
from narrowcast.training.features import (
    Inputs,
    Student,
    StudentOutputs,
    Taps,
    called,
    channels,
    distance,
    first,
    matching,
    mean_square,
)
from narrowcast.training.policies import Precision
from narrowcast.training.policies import precision as policy_of
from narrowcast.training.window import Loss

if TYPE_CHECKING:
    from narrowcast.training.teacher_cache import TeacherCache

__all__ = [
    "UNLABELLED",
    "Distillation",
    "Feature",
    "Parts",
    "Taught",
    "labelled_cross_entropy",
    "logits_of",
]

#: The label of a sample that has none: the teacher alone teaches it.
UNLABELLED = -100


class Feature(NamedTuple):
    """A feature of the teacher that one of the student is to resemble.

    Both are outputs of modules, by name or by a pattern whose ``*`` stands within one part of a dotted name
    (``"blocks.*.mlp"``). Patterns that match several modules pair them in the order in which the networks define them.
    """

    teacher: str
    student: str
    weight: float = 1.0


class Taught(NamedTuple):
    """What a student is to learn for a batch: the targets of a `Distillation`."""

    labels: Tensor | None  # [N], or what the hard loss takes; None: there are none
    logits: Tensor  # the teacher's
    features: tuple[Tensor, ...] = ()


class Parts(NamedTuple):
    """The unweighted terms of a loss, each a scalar without gradient; None where a term was not computed."""

    hard: Tensor | None
    soft: Tensor | None
    features: tuple[Tensor, ...]


class Distillation:
    """A loss of a student's outputs and of what its teacher said: see the module.

    Args:
        teacher: A trained network, on the device of the batches. It is put into evaluation mode, its parameters out of
            training and into ``precision``.
        temperature: T, above 0; both sides' logits are divided by it. Read by ``match="kl"`` alone.
        alpha: Share of the soft loss, 0 to 1; the hard loss has the rest.
        hard: From the student's outputs and the labels to their mean loss, or to a `Loss`, whose weight then holds for all
            terms; None: cross-entropy over the samples that have a label (those labelled `UNLABELLED` have none).
        match: How outputs are compared: ``"kl"`` for classes, ``"mse"`` for logits or other numbers.
        features: Pairs of module names or patterns, the teacher's first, perhaps with a weight: see `Feature`.
        precision: That the teacher runs in: a name or a policy of `narrowcast.training.policies`.

    Raises:
        TrainingError: A value is out of its range, or a pattern matches no module of the teacher.
    """

    def __init__(
        self,
        teacher: nn.Module,
        *,
        temperature: float = 4.0,
        alpha: float = 0.9,
        hard: Callable[[Any, Any], Tensor | Loss] | None = None,
        match: Literal["kl", "mse"] = "kl",
        features: Sequence[tuple[str, str] | tuple[str, str, float]] = (),
        precision: str | Precision = "fp32",
    ) -> None:
        if not (math.isfinite(temperature) and temperature > 0):
            raise TrainingError(f"distillation temperature {temperature}", allowed="a number above 0, often 2 to 8")
        if not 0 <= alpha <= 1:
            raise TrainingError(f"distillation alpha {alpha}", allowed="0 (labels alone) to 1 (the teacher alone)")
        if match not in _MATCHES:
            raise TrainingError(f"distillation match {match!r}", allowed=choices(match, _MATCHES))
        self.temperature = temperature
        self.alpha = alpha
        self.hard = hard or labelled_cross_entropy
        self.match = match
        self.features = tuple(map(Feature._make, map(_with_weight, features)))
        for item in self.features:
            if not (math.isfinite(item.weight) and item.weight > 0):
                raise TrainingError(f"weight {item.weight} of feature {item.teacher!r}", allowed="a number above 0")
        self.teacher = teacher.requires_grad_(False).eval()
        self.precision = policy_of(precision)
        self.precision.prepare(self.teacher)
        self.cache: TeacherCache | None = None
        self.parts: Parts | None = None
        self._matched = tuple(matching(self.teacher, item.teacher, "the teacher") for item in self.features)
        self._taps = Taps(self.teacher, [name for names in self._matched for name in names])
        self._sizes: tuple[Tensor, ...] = ()  # mean squares of the teacher's features

    # The batch --------------------------------------------------------------------------------------------------------

    def batch(self, inputs: Inputs, labels: Tensor | None = None, index: Tensor | None = None) -> tuple[Inputs, Taught]:
        """Return a batch for ``Trainer.step``: the inputs, and the labels beside what the teacher says of them.

        Args:
            inputs: A tensor, a tuple of tensors (positional) or a dictionary (keywords), as both networks take them.
            labels: What the hard loss takes; None where there are none.
            index: Number of each sample in the data, shape [N], integers; needed with a cache, ignored without.

        Raises:
            TrainingError: The cache needs an index, does not hold it, or holds the outputs of other inputs.
        """
        taught = self.teach(inputs) if self.cache is None else self.cache.look_up(inputs, index)
        return inputs, taught._replace(labels=labels)

    def teach(self, inputs: Inputs) -> Taught:
        """Return what the teacher says of inputs, without labels: its outputs, and its features in the order of `features`.

        Raises:
            TrainingError: The teacher returns no tensor.
        """
        device = first(inputs).device
        policy = self.precision
        if policy.parameters == "bf16":
            inputs = tree_map_only(Tensor, lambda one: one.bfloat16() if one.is_floating_point() else one, inputs)
        # The caller's autocast is the student's: the teacher's own policy holds in here.
        with (
            torch.no_grad(),
            torch.autocast(device.type, enabled=False),
            policy.running(device),
            policy.autocast(device),
            self._taps,
        ):
            logits = logits_of(called(self.teacher, inputs), "the teacher")
            return Taught(None, logits, self._taps.take())

    # The student ------------------------------------------------------------------------------------------------------

    def student(self, network: nn.Module, example: Inputs) -> nn.Module:
        """Return what to train: the network itself, or, where features are asked for, a `Student` around it.

        Args:
            network: The network that learns.
            example: A few samples, on the device of both networks: the features' shapes are read from them, and how large
                the teacher's are.

        Raises:
            TrainingError: A pattern matches no module, another number of modules than the teacher's, or features whose
                shapes cannot be compared.
        """
        if not self.features:
            return network
        names: list[str] = []
        for item, theirs in zip(self.features, self._matched, strict=True):
            mine = matching(network, item.student, "the student")
            if len(mine) != len(theirs):
                raise TrainingError(
                    f"{item.teacher!r} matches {len(theirs)} modules of the teacher, "
                    f"{item.student!r} {len(mine)} of the student",
                    next_step="give a pair for each, or patterns that match as many",
                )
            names += mine
        wanted = self.teach(example).features
        self._sizes = tuple(map(mean_square, wanted))
        return Student(network, names, example, wanted)

    # The loss ---------------------------------------------------------------------------------------------------------

    def __call__(self, outputs: Any, taught: Taught) -> Tensor | Loss:
        """Return the loss, a mean (0-d, FP32) or a `Loss` where the hard one is, and keep its terms in `parts`.

        Args:
            outputs: The student's: of the network, or `StudentOutputs`.
            taught: The targets that `batch` gave.

        Raises:
            TrainingError: Student and teacher differ in the shape of their outputs, or the student hands out no features.
        """
        mine = outputs.features if isinstance(outputs, StudentOutputs) else ()
        outputs = outputs.outputs if isinstance(outputs, StudentOutputs) else outputs
        if not len(mine) == len(taught.features) == len(self._sizes):
            raise TrainingError(
                f"the teacher gave {len(taught.features)} features, the student {len(mine)}",
                next_step="train what distillation.student(network, example) returns, in training mode",
            )
        soft = None if self.alpha == 0 else self._soft(outputs, taught.logits)
        hard = None if taught.labels is None or self.alpha == 1 else self.hard(outputs, taught.labels)
        pairs = zip(mine, taught.features, self._sizes, strict=True)
        distances = tuple(distance(student, teacher) / size for student, teacher, size in pairs)
        if hard is None and soft is None and not distances:
            raise TrainingError(
                "a batch without labels, and alpha is 0", next_step="give labels, or an alpha above 0 for the teacher"
            )
        self.parts = Parts(
            None if hard is None else (hard.total / hard.weight if isinstance(hard, Loss) else hard).detach(),
            None if soft is None else soft.detach(),
            tuple(one.detach() for one in distances),
        )
        from_teacher = torch.zeros((), device=taught.logits.device) if soft is None else self.alpha * soft
        for weight, term in zip(self._weights(), distances, strict=True):
            from_teacher = from_teacher + weight * term
        if isinstance(hard, Loss):
            return Loss((1 - self.alpha) * hard.total.float() + hard.weight * from_teacher, hard.weight)
        return from_teacher if hard is None else (1 - self.alpha) * hard.float() + from_teacher

    def _soft(self, outputs: Any, theirs: Tensor) -> Tensor:
        mine = logits_of(outputs, "the student")
        if mine.shape != theirs.shape:
            raise TrainingError(
                f"the student's outputs are {list(mine.shape)}, the teacher's {list(theirs.shape)}",
                allowed="the same shape: as many classes, in the same order",
            )
        if self.match == "kl" and (mine.ndim < 2 or mine.shape[channels(mine)] < 2):
            raise TrainingError(
                f"outputs {list(mine.shape)} are no logits of classes", next_step='compare numbers with match="mse"'
            )
        return _MATCHES[self.match](mine.float(), theirs.float(), self.temperature)

    def _weights(self) -> list[float]:
        """Return the weight of each feature: of each module that a pattern matches."""
        return [item.weight for item, names in zip(self.features, self._matched, strict=True) for _ in names]


# Losses ---------------------------------------------------------------------------------------------------------------


def labelled_cross_entropy(outputs: Any, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy over what has a label; 0 where nothing has one.

    Args:
        outputs: Logits, the classes on the channels' axis, or a model's outputs that hold them.
        labels: Class indices of the other axes, int64; `UNLABELLED` for none.
    """
    logits = logits_of(outputs, "the student").float()
    flat = logits.movedim(channels(logits), -1).flatten(0, -2)
    total, count = cross_entropy_sum(flat, labels.flatten(), ignore=UNLABELLED)
    return total / count.clamp(min=1)


def _divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return T² KL(teacher || student) of the softened outputs, the mean over all axes but the classes'."""
    axis = channels(student)
    mine, theirs = (F.log_softmax(logits / temperature, axis) for logits in (student, teacher))
    return temperature**2 * F.kl_div(mine, theirs, reduction="none", log_target=True).sum(axis).mean()


def _squares(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return the mean squared difference."""
    return F.mse_loss(student, teacher)


_MATCHES: Mapping[str, Callable[[Tensor, Tensor, float], Tensor]] = {"kl": _divergence, "mse": _squares}


def _with_weight(pair: tuple[str, str] | tuple[str, str, float]) -> tuple[str, str, float]:
    return pair if len(pair) == 3 else (*pair, 1.0)


# Outputs and features -------------------------------------------------------------------------------------------------


def logits_of(outputs: Any, whose: str) -> Tensor:
    """Return the tensor that outputs are compared by: themselves, ``outputs["logits"]``, or the first of a tuple.

    Raises:
        TrainingError: There is none.
    """
    found: Any = outputs
    if isinstance(outputs, Mapping):
        found = cast(Mapping[str, Any], outputs).get("logits")
    elif isinstance(outputs, tuple) and outputs:
        found = cast(tuple[Any, ...], outputs)[0]
    if not isinstance(found, Tensor):
        raise TrainingError(
            f"{whose} returns {type(outputs).__name__}, in which there are no logits",
            allowed='a tensor, a mapping with "logits", or a tuple that begins with a tensor',
        )
    return found

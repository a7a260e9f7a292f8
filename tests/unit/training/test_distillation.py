from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy.special import softmax
from torch import Tensor, nn

from narrowcast.errors import FormatError, TrainingError
from narrowcast.training import Loss, Trainer
from narrowcast.training.distillation import UNLABELLED, Distillation, Taught
from narrowcast.training.features import Student, StudentOutputs


def network(width: int, *, seed: int = 0, norm: bool = False) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.BatchNorm2d(width) if norm else nn.Identity(),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, 5),
    )


@pytest.fixture
def images() -> Tensor:
    return torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def labels() -> Tensor:
    return torch.tensor([0, 1, 2, 3, 4, 0])


def mean(value: Tensor | Loss) -> Tensor:
    assert isinstance(value, Tensor)
    return value


def test_the_soft_loss_is_the_divergence_of_softened_outputs_times_the_temperature_squared():
    mine, theirs = torch.tensor([[1.0, 2.0, -1.0], [0.0, 0.5, 3.0]]), torch.tensor([[2.0, 0.0, 1.0], [0.0, 1.0, 2.0]])
    p, q = softmax(theirs.double().numpy() / 3, axis=1), softmax(mine.double().numpy() / 3, axis=1)
    expected = 9 * (p * torch.log(torch.tensor(p / q)).numpy()).sum(axis=1).mean()
    loss = Distillation(nn.Identity(), temperature=3.0, alpha=1.0)
    assert float(mean(loss(mine, Taught(None, theirs)))) == pytest.approx(expected, rel=1e-5)


def test_a_high_temperature_approaches_the_squared_difference_of_centred_logits():
    # Hinton et al. 2015, equation 4: with zero-mean logits the gradient tends to (z - v) / (N T**2); times T**2 it is that of
    # half the mean squared difference.
    mine, theirs = (torch.randn(4, 7, dtype=torch.float64) for _ in range(2))
    mine, theirs = (x - x.mean(1, keepdim=True) for x in (mine, theirs))
    mine.requires_grad_(True)
    mean(Distillation(nn.Identity(), temperature=1e3, alpha=1.0)(mine, Taught(None, theirs))).backward()
    assert mine.grad is not None
    torch.testing.assert_close(mine.grad, (mine - theirs).detach() / 7 / 4, rtol=2e-2, atol=2e-4)


def test_hard_and_soft_are_weighted_and_kept_apart(labels: Tensor):
    mine, theirs = torch.randn(6, 5), torch.randn(6, 5)
    loss = Distillation(nn.Identity(), temperature=2.0, alpha=0.3)
    total = mean(loss(mine, Taught(labels, theirs)))
    soft = 4 * F.kl_div(
        F.log_softmax(mine / 2, 1), F.log_softmax(theirs / 2, 1), reduction="batchmean", log_target=True
    )
    torch.testing.assert_close(total, 0.7 * F.cross_entropy(mine, labels) + 0.3 * soft)
    assert loss.parts is not None
    torch.testing.assert_close(loss.parts.hard, F.cross_entropy(mine, labels))
    torch.testing.assert_close(loss.parts.soft, soft)
    assert loss.parts.features == ()


@pytest.mark.parametrize("shape", [(3, 4, 5), (3, 5, 2, 2)], ids=["tokens", "maps"])
def test_classes_lie_last_or_second_where_there_are_more_than_three_axes(shape: tuple[int, ...]):
    mine, theirs = torch.randn(shape), torch.randn(shape)
    axis = 2 if len(shape) == 3 else 1
    rows = [x.movedim(axis, -1).reshape(-1, 5) for x in (mine, theirs)]
    targets = torch.randint(5, (len(rows[0]),))
    loss = Distillation(nn.Identity(), temperature=2.0, alpha=0.5)
    whole = mean(loss(mine, Taught(targets.reshape(rows[0].shape[0] // 12 * 3, 4), theirs)))
    torch.testing.assert_close(whole, mean(loss(rows[0], Taught(targets, rows[1]))))


def test_samples_without_a_label_are_taught_by_the_teacher_alone(labels: Tensor):
    mine, theirs = torch.randn(6, 5), torch.randn(6, 5)
    loss = Distillation(nn.Identity(), alpha=0.5)
    some = labels.clone()
    some[2:] = UNLABELLED
    mean(loss(mine, Taught(some, theirs)))
    assert loss.parts is not None
    torch.testing.assert_close(loss.parts.hard, F.cross_entropy(mine[:2], labels[:2]))
    nobody = mean(loss(mine, Taught(torch.full_like(labels, UNLABELLED), theirs)))
    torch.testing.assert_close(nobody, 0.5 * loss.parts.soft)
    without = mean(loss(mine, Taught(None, theirs)))
    assert float(without) == float(nobody)


def test_numbers_are_compared_by_their_squared_difference():
    mine, theirs = torch.randn(6, 1), torch.randn(6, 1)
    loss = Distillation(nn.Identity(), alpha=1.0, match="mse")
    torch.testing.assert_close(mean(loss(mine, Taught(None, theirs))), F.mse_loss(mine, theirs))


def test_a_hard_loss_that_is_a_sum_gives_a_sum(labels: Tensor):
    def summed(outputs: Tensor, targets: Tensor) -> Loss:
        return Loss(F.cross_entropy(outputs, targets, reduction="sum"), len(targets))

    mine, theirs = torch.randn(6, 5), torch.randn(6, 5)
    found = Distillation(nn.Identity(), hard=summed)(mine, Taught(labels, theirs))
    assert isinstance(found, Loss)
    torch.testing.assert_close(
        found.total / found.weight, mean(Distillation(nn.Identity())(mine, Taught(labels, theirs)))
    )


# The teacher ----------------------------------------------------------------------------------------------------------


def test_the_teacher_neither_learns_nor_moves(images: Tensor, labels: Tensor):
    teacher = network(4, norm=True)
    before = copy.deepcopy(teacher.state_dict())
    distillation = Distillation(teacher)
    student = network(2)
    trainer = Trainer(student, torch.optim.SGD(student.parameters(), lr=0.1), distillation)
    teacher_says = distillation.teach(images).logits
    for _ in range(3):
        trainer.step(distillation.batch(images, labels))
    assert not teacher_says.requires_grad
    assert not teacher.training
    assert all(parameter.grad is None for parameter in teacher.parameters())
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16-mixed", torch.bfloat16), ("bf16-true", torch.bfloat16)]
)
def test_the_teacher_runs_in_its_own_precision_whatever_the_caller_runs_in(
    images: Tensor, precision: str, dtype: torch.dtype
):
    teacher = network(4)
    with torch.no_grad():
        expected = teacher(images)
    distillation = Distillation(teacher, precision=precision)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = distillation.teach(images).logits
    assert found.dtype == dtype
    torch.testing.assert_close(
        found.float(), expected, **({"rtol": 0, "atol": 0} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.02})
    )
    assert next(teacher.parameters()).dtype == (torch.bfloat16 if precision == "bf16-true" else torch.float32)


def test_students_in_half_precision_are_compared_in_fp32(images: Tensor, labels: Tensor):
    distillation = Distillation(network(4), precision="bf16-mixed", features=[("3", "3")])
    student = distillation.student(network(2, seed=3), images)
    trainer = Trainer(student, torch.optim.SGD(student.parameters(), lr=0.1), distillation, precision="bf16-mixed")
    info = trainer.step(distillation.batch(images, labels))
    assert distillation.parts is not None
    assert distillation.parts.soft is not None
    assert {term.dtype for term in (distillation.parts.soft, *distillation.parts.features)} == {torch.float32}
    assert info.updated


@pytest.mark.parametrize("kind", ["tuple", "mapping", "first"])
def test_inputs_and_outputs_may_be_structures(kind: str, images: Tensor):
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network(2)

        def forward(self, pixels: Tensor, factor: Tensor) -> Any:
            logits = self.inner(pixels * factor)
            return {"tuple": logits, "mapping": {"loss": None, "logits": logits}, "first": (logits, images)}[kind]

    factor = torch.tensor(2.0)
    distillation = Distillation(Wrapped())
    inputs: Any = {"pixels": images, "factor": factor} if kind == "mapping" else (images, factor)
    _, taught = distillation.batch(inputs)
    torch.testing.assert_close(taught.logits, network(2)(2 * images).detach())
    student = Wrapped()
    outputs = student(**inputs) if kind == "mapping" else student(*inputs)
    assert float(mean(distillation(outputs, taught)).detach()) == pytest.approx(0.0, abs=1e-6)


# Features -------------------------------------------------------------------------------------------------------------


def test_features_are_pulled_towards_the_teachers(images: Tensor):
    teacher = network(4)
    distillation = Distillation(teacher, alpha=0.0, features=[("0", "0", 2.0)])
    student = distillation.student(network(2, seed=1), images)
    assert isinstance(student, Student)
    assert isinstance(student.projections[0], nn.Conv2d)
    assert student.projections[0].weight.shape == (4, 2, 1, 1)
    student.train()
    outputs = student(images)
    _, taught = distillation.batch(images)
    found = mean(distillation(outputs, taught))
    mine, theirs = student.projections[0](student.network[0](images)), teacher[0](images)
    torch.testing.assert_close(found, 2 * F.mse_loss(mine, theirs) / theirs.square().mean())
    trainer = Trainer(student, torch.optim.Adam(student.parameters(), lr=1e-2), distillation)
    for _ in range(60):
        trainer.step(distillation.batch(images))
    assert distillation.parts is not None
    assert float(distillation.parts.features[0]) < 0.25 * float(found.detach())


@pytest.mark.parametrize("setting", [{"match": "kl"}, {"match": "mse", "alpha": 0.3}], ids=["kl", "mse"])
def test_a_batch_comes_to_the_same_however_it_is_shared(images: Tensor, setting: dict[str, Any]):
    teacher = network(4)
    distillation = Distillation(teacher, features=[("0", "0", 2.0), ("3", "3")], **setting)
    student = distillation.student(network(2, seed=1), images[:2]).train()
    labels = torch.arange(len(images)) % 5
    images = images * torch.linspace(0.1, 3, len(images))[:, None, None, None]  # features of very different sizes

    def loss(part: slice) -> Tensor:
        return mean(distillation(student(images[part]), distillation.batch(images[part], labels[part])[1]))

    half = len(images) // 2
    torch.testing.assert_close((loss(slice(half)) + loss(slice(half, 2 * half))) / 2, loss(slice(2 * half)))


def test_equal_widths_need_no_projection_and_larger_maps_are_averaged(images: Tensor):
    teacher = nn.Sequential(nn.Conv2d(1, 3, 1), nn.Flatten(), nn.Linear(192, 5))
    student = nn.Sequential(nn.Conv2d(1, 3, 1, stride=2), nn.Flatten(), nn.Linear(48, 5))
    distillation = Distillation(teacher, alpha=0.0, features=[("0", "0")])
    wrapped = distillation.student(student, images)
    assert [type(one) for one in wrapped.projections] == [nn.Identity]
    outputs = wrapped.train()(images)
    theirs = F.avg_pool2d(teacher[0](images), 2)
    expected = F.mse_loss(student[0](images), theirs) / teacher[0](images).square().mean()
    torch.testing.assert_close(mean(distillation(outputs, distillation.batch(images)[1])), expected)


def test_patterns_pair_modules_in_order_and_tokens_are_projected_along_the_last_axis():
    def encoder(width: int) -> nn.ModuleDict:
        return nn.ModuleDict(
            {"blocks": nn.ModuleList(nn.Linear(width, width) for _ in range(2)), "head": nn.Linear(width, 5)}
        )

    class Tokens(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, width)
            self.parts = encoder(width)

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.embed(tokens)
            for block in self.parts["blocks"]:
                x = block(x).tanh()
            return self.parts["head"](x)

    tokens = torch.randint(11, (2, 6))
    distillation = Distillation(Tokens(8), features=[("parts.blocks.*", "parts.blocks.*", 0.5)])
    student = distillation.student(Tokens(4), tokens).train()
    outputs = student(tokens)
    assert isinstance(outputs, StudentOutputs)
    assert [list(feature.shape) for feature in outputs.features] == [[2, 6, 8], [2, 6, 8]]
    mean(distillation(outputs, distillation.batch(tokens)[1])).backward()
    assert student.projections[1].weight.grad is not None


def test_a_student_is_its_network_outside_of_training(images: Tensor):
    distillation = Distillation(network(4), features=[("3", "3")])
    inner = network(2, norm=True).train()
    before = copy.deepcopy(inner.state_dict())
    student = distillation.student(inner, images)
    assert inner.training
    assert all(torch.equal(value, before[name]) for name, value in inner.state_dict().items())
    student.eval()
    assert torch.equal(student(images), inner(images))
    assert not any("teacher" in name for name in student.state_dict())
    assert Distillation(network(4)).student(inner, images) is inner


def test_a_compiled_student_hands_out_features_too(images: Tensor):
    distillation = Distillation(network(4), features=[("3", "3")])
    student = distillation.student(network(2), images).train()
    plain = student(images)
    torch._dynamo.reset()
    compiled = torch.compile(student, backend="aot_eager")(images)
    torch.testing.assert_close(compiled.outputs, plain.outputs)
    torch.testing.assert_close(compiled.features[0], plain.features[0])


# Mistakes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"temperature": 0.0}, "temperature 0.0"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"alpha": 1.5}, "alpha 1.5"),
        ({"match": "cosine"}, "kl, mse"),
        ({"features": [("0", "0", -1.0)]}, "weight -1.0"),
        ({"features": [("conv", "0")]}, "no module 'conv'"),
    ],
    ids=["no temperature", "nan", "alpha", "match", "weight", "module"],
)
def test_settings_out_of_range_are_refused(setting: dict[str, Any], words: str):
    with pytest.raises(TrainingError, match=words):
        Distillation(network(2), **setting)


def test_an_unknown_precision_is_refused():
    with pytest.raises(FormatError, match="fp17"):
        Distillation(network(2), precision="fp17")


def test_students_that_do_not_fit_are_refused(images: Tensor, labels: Tensor):
    plain = Distillation(network(2))
    _, taught = plain.batch(images, labels)
    with pytest.raises(TrainingError, match=r"\[6, 4\], the teacher's \[6, 5\]"):
        plain(torch.randn(6, 4), taught)
    with pytest.raises(TrainingError, match="logits"):
        plain("outputs", taught)
    with pytest.raises(TrainingError, match="mse"):
        plain(torch.randn(6), Taught(None, torch.randn(6)))
    with pytest.raises(TrainingError, match="alpha is 0"):
        Distillation(network(2), alpha=0.0)(torch.randn(6, 5), Taught(None, torch.randn(6, 5)))


def test_features_that_cannot_be_compared_are_refused(images: Tensor):
    with pytest.raises(TrainingError, match=r"'7' is \[6, 5\], the teacher's \[6, 8, 4, 4\]"):
        Distillation(network(4), features=[("3", "7")]).student(network(2), images)
    with pytest.raises(TrainingError, match="the student has no module '9'"):
        Distillation(network(4), features=[("3", "9")]).student(network(2), images)
    with pytest.raises(TrainingError, match="8 modules of the teacher, '0' 1"):
        Distillation(network(4), features=[("*", "0")]).student(network(2), images)
    unused = network(2)
    unused.add_module("spare", nn.ModuleDict({"unused": nn.Linear(2, 2)}))
    unused.forward = lambda x: nn.Sequential(*list(unused)[:8])(x)  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match=r"'spare.unused' did not run"):
        Distillation(network(4), features=[("3", "spare.unused")]).student(unused, images)


def test_a_student_without_its_features_is_noticed(images: Tensor, labels: Tensor):
    distillation = Distillation(network(4), features=[("3", "3")])
    inner = network(2)
    distillation.student(inner, images)
    with pytest.raises(TrainingError, match="gave 1 features, the student 0"):
        distillation(inner(images), distillation.batch(images, labels)[1])

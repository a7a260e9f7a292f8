"""Decisions that the host learns late come to what immediate ones come to, and are there whenever somebody reads."""

from __future__ import annotations

import copy
import gc
import logging
import weakref

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from narrowcast.errors import OutputError, TrainingError
from narrowcast.training import DynamicScale, StaticScale, Trainer, precision
from narrowcast.training.doctor.values import Part
from narrowcast.training.doctor.watch import Watch as Doctor
from narrowcast.training.fused import FusedAdamW
from narrowcast.training.settling import Courier

OPTIMIZERS = {
    "adam": lambda params: torch.optim.Adam(params, lr=1e-2, amsgrad=True, fused=True),
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-2, fused=True),
    "sgd": lambda params: torch.optim.SGD(params, lr=1e-2, fused=True),
    "sgd-momentum": lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9, nesterov=True, fused=True),
    "own": lambda params: FusedAdamW(params, lr=1e-2),
    "adagrad": lambda params: torch.optim.Adagrad(params, lr=1e-2, lr_decay=0.1, fused=True),
}
POLICIES = {
    "fp16-mixed": lambda: precision("fp16-mixed", loss_scale=DynamicScale(initial=2.0**10, interval=3, hysteresis=2)),
    "static": lambda: precision("fp16-mixed", loss_scale=StaticScale(256.0)),
    "fp32": lambda: precision("fp32"),
    "bf16-true": lambda: precision("bf16-true"),
    "bf16-true-kahan": lambda: precision("bf16-true", update="kahan"),
}
FAULTS = {3: float("inf"), 4: float("nan"), 8: float("inf"), 15: float("nan"), 16: float("nan"), 22: float("inf")}


class Faulty(nn.Module):
    """Adds a fault to the gradient inside, which is set from outside."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(4, 8)
        self.norm = nn.BatchNorm1d(8)
        self.second = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)
        self.fault = 0.0

    def forward(self, x):
        x = self.second(torch.relu(self.norm(self.first(x))))
        x.register_hook(lambda grad, fault=self.fault: grad + fault)
        return self.head(torch.relu(x))


def trainer_of(
    optimizer: str = "adamw", policy: str = "fp16-mixed", *, late: bool, seed: int = 0, **settings
) -> Trainer:
    model = Faulty(seed)
    made = OPTIMIZERS[optimizer](model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        made, max_lr=3e-2, total_steps=40, cycle_momentum=optimizer not in ("sgd", "adagrad")
    )
    settings = {"clip_norm": 0.5, "nonfinite": "skip", "watch": None} | settings
    trainer = Trainer(model, made, cross_entropy, precision=POLICIES[policy](), schedule=schedule, **settings)
    trainer._settles_late = late
    return trainer


def fed(trainer: Trainer, number: int):
    """Take a step with the batch of a number, whose size and whose fault depend on it."""
    inputs = torch.randn(4 + number % 3, 4, generator=torch.Generator().manual_seed(number))
    trainer.model.fault = FAULTS.get(number, 0.0)
    return trainer.step((inputs, inputs[:, :3].argmax(1)))


def seen(info) -> tuple:
    return (info.loss, info.grad_norm, info.lr, info.scale, info.step, info.updated, info.skipped)


def same(left, right) -> bool:
    """Return whether two trees of states hold the same bits; NaN is NaN."""
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left.nan_to_num(1e9), right.nan_to_num(1e9))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right or (left != left and right != right)


def whole(trainer: Trainer) -> dict:
    return copy.deepcopy(trainer.state_dict()) | {"ledger": list(trainer.ledger)}


def run(trainer: Trainer, first: int, last: int, *, read_at_once: bool = False) -> list[tuple]:
    """Take steps, close the last window, and return what the steps say, read at the end or at once."""
    infos = []
    for number in range(first, last):
        infos.append(fed(trainer, number))
        if read_at_once:
            seen(infos[-1])
    infos += [info] if (info := trainer.flush()) else []
    return [seen(info) for info in infos]


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize(
    ("optimizer", "policy"), [(name, "fp16-mixed") for name in OPTIMIZERS] + [("adamw", name) for name in POLICIES]
)
def test_it_comes_to_the_same_whenever_decisions_are_learnt(optimizer, policy, accumulate, caplog):
    logs, runs = [], []
    for late, read_at_once in ((False, False), (True, False), (True, True)):
        trainer = trainer_of(optimizer, policy, late=late, accumulate=accumulate)
        with caplog.at_level(logging.WARNING, logger="narrowcast.training"):
            runs.append((run(trainer, 0, 26, read_at_once=read_at_once), whole(trainer)))
        logs.append([record.getMessage() for record in caplog.records])
        caplog.clear()
    assert trainer.skipped == len(trainer.ledger) == len(logs[0]) == (6 if accumulate == 1 else 4)
    assert {one.kind for one in trainer.ledger} == {"inf", "nan"}
    assert trainer.steps + trainer.skipped == -(-26 // accumulate)
    assert same(runs[1], runs[0])
    assert same(runs[2], runs[0])
    assert logs[1] == logs[2] == logs[0]


@pytest.mark.parametrize("cut", [9, 14, 17])
def test_a_run_goes_on_from_a_state_taken_with_a_decision_under_way(cut):
    """The last update before the cut is left out at 9 and at 17, and made at 14."""
    expected = trainer_of(late=False)
    run(expected, 0, cut)
    broken = trainer_of(late=True)
    for number in range(cut):
        fed(broken, number)
    saved = copy.deepcopy(broken.state_dict())
    assert same(saved, expected.state_dict())
    resumed = trainer_of(late=True, seed=1)
    fed(resumed, 3)  # a decision under way when the state is loaded
    resumed.load_state_dict(saved)
    assert same(run(resumed, cut, 26), run(expected, cut, 26))
    assert same(resumed.state_dict(), expected.state_dict())


READERS = {
    "info.step": lambda trainer, info: info.step,
    "info.updated": lambda trainer, info: info.updated,
    "info.skipped": lambda trainer, info: info.skipped,
    "steps": lambda trainer, info: trainer.steps,
    "skipped": lambda trainer, info: trainer.skipped,
    "scale": lambda trainer, info: trainer.scale,
    "ledger": lambda trainer, info: trainer.ledger,
    "optimizer": lambda trainer, info: trainer.optimizer,
    "schedule": lambda trainer, info: trainer.schedule,
    "state_dict": lambda trainer, info: trainer.state_dict(),
    "flush": lambda trainer, info: trainer.flush(),
    "discard": lambda trainer, info: trainer.discard(),
    "finish": lambda trainer, info: trainer.finish(),
}


@pytest.mark.parametrize("reader", READERS)
def test_whoever_reads_has_it_settled(reader):
    trainer = trainer_of(late=True)
    schedule = trainer.schedule
    info = fed(trainer, 0)
    assert (schedule.last_epoch, info.loss > 0, info.grad_norm > 0, info.scale) == (0, True, True, 2.0**10)
    assert schedule.last_epoch == 0
    READERS[reader](trainer, info)
    assert schedule.last_epoch == 1
    READERS[reader](trainer, info)
    assert schedule.last_epoch == trainer.steps == 1


def test_a_step_settles_the_one_before_when_its_forward_pass_is_queued_and_before_its_backward_pass():
    trainer = trainer_of(late=True)
    schedule, at = trainer.schedule, []

    def loss(outputs, targets):
        at.append(("forward", schedule.last_epoch))
        outputs.register_hook(lambda grad: at.append(("backward", schedule.last_epoch)))
        return cross_entropy(outputs, targets)

    trainer.loss = loss
    for number in range(5):
        fed(trainer, number)
    assert [epoch for what, epoch in at if what == "forward"] == [0, 0, 1, 2, 3]
    assert [epoch for what, epoch in at if what == "backward"] == [
        0,
        1,
        2,
        3,
        3,
    ]  # the one before the last was left out


@pytest.mark.parametrize("optimizer", ["adamw", "own"])
def test_no_gradient_is_kept_for_a_decision(optimizer):
    trainer = trainer_of(optimizer, late=True)
    held = []
    trainer.model.head.weight.register_post_accumulate_grad_hook(lambda one: held.append(weakref.ref(one.grad)))
    fed(trainer, 3)
    gc.collect()
    assert held[0]() is None
    assert trainer.ledger[0].layers[0] == "second.bias"


@pytest.mark.parametrize("optimizer", ["adamw", "own"])
def test_what_is_asked_without_waiting_waits_for_nothing(optimizer, monkeypatch):
    trainer = trainer_of(optimizer, late=True, accumulate=2)
    asked = []
    receive = Courier.receive
    monkeypatch.setattr(Courier, "receive", lambda courier: asked.append(1) or receive(courier))
    closed, steps = [], []
    for number in range(8):
        info = fed(trainer, number)
        closed.append(info.closed)
        steps.append(trainer.steps_at_most)
        assert len(asked) == number // 2
    assert closed == [False, True] * 4
    assert steps == [0, 1, 1, 2, 1, 2, 1, 2]  # the second and the third were left out
    assert trainer.steps == 2


class Watch:
    """A watch that looks at nothing."""

    def before_forward(self, trainer_step, batch): ...

    def after_backward(self, model, scale): ...

    def before_update(self, model): ...

    def after_update(self, model, info): ...

    def on_nonfinite(self, broken): ...


IMMEDIATE = {
    "no-fused-optimizer": lambda: other(torch.optim.AdamW),
    "own-optimizer-that-does-not-count": lambda: other(Uncounted),
    "first-momentum": lambda: trainer_of("sgd-momentum", late=True),
    "cpu": lambda: Trainer(
        (model := Faulty()), OPTIMIZERS["adamw"](model.parameters()), cross_entropy, precision=POLICIES["fp16-mixed"]()
    ),
}


class Uncounted(torch.optim.AdamW):
    """An optimizer that leaves updates out by itself, and does not say what broke."""

    def update(self, inverse_scale, clip_norm):
        self.step()
        return torch.ones(()), torch.tensor(True)


def other(kind) -> Trainer:
    model = Faulty()
    trainer = Trainer(model, kind(model.parameters()), cross_entropy, precision=POLICIES["fp16-mixed"]())
    trainer._settles_late = True
    return trainer


@pytest.mark.parametrize("case", IMMEDIATE)
def test_where_the_device_cannot_decide_alone_it_is_known_at_once(case):
    trainer = IMMEDIATE[case]()
    schedule = torch.optim.lr_scheduler.ExponentialLR(trainer.optimizer, 0.5)
    trainer.schedule = schedule
    fed(trainer, 0)
    assert schedule.last_epoch == 1


def test_a_watch_that_comes_later_finds_everything_settled():
    trainer = trainer_of(late=True)
    schedule = trainer.schedule
    fed(trainer, 0)
    steps = []
    trainer.watch = watch = Watch()
    watch.before_forward = lambda step, batch: steps.append((step, schedule.last_epoch))
    watch.after_backward = lambda model, scale: steps.append(schedule.last_epoch)
    fed(trainer, 1)
    assert steps == [(1, 1), 1]
    trainer.watch = None
    fed(trainer, 2)
    assert schedule.last_epoch == trainer.steps_at_most - 1 == 2


class Growing(nn.Module):
    """Uses its second layer only when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.grown = nn.Linear(4, 3), nn.Linear(4, 3), False

    def forward(self, x):
        return self.first(x) + self.second(x) if self.grown else self.first(x)


@pytest.mark.parametrize("late", [False, True], ids=["at-once", "late"])
def test_no_momentum_begins_with_an_update_that_is_left_out(late):
    """PyTorch's fused SGD makes a group's momentum without writing to it, and is then told to leave the update out."""
    model = Growing()
    groups = [{"params": list(one.parameters())} for one in (model.first, model.second)]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, fused=True)
    policy = precision("fp16-mixed", loss_scale=StaticScale(16.0))
    trainer = Trainer(model, optimizer, cross_entropy, precision=policy)
    trainer._settles_late = late
    inputs, targets = torch.linspace(-1, 1, 24).reshape(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])

    def momentum() -> list[bool]:
        return ["momentum_buffer" in optimizer.state.get(one, {}) for one in model.parameters()]

    for broken, grown, expected in (
        (True, False, [False] * 4),
        (False, False, [True, True, False, False]),
        (True, True, [True, True, False, False]),
        (False, True, [True] * 4),
        (True, True, [True] * 4),
        (False, True, [True] * 4),
    ):
        model.grown = grown
        assert trainer.step((inputs * torch.inf if broken else inputs, targets)).skipped == broken
        assert momentum() == expected
    assert all(one.isfinite().all() for state in optimizer.state.values() for one in state.values())


class Noted(Watch):
    """A watch that writes down what it is called with, and what it finds then."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []
        self.model: Faulty | None = None

    def note(self, *what) -> None:
        held = None if self.model is None else [float(one.detach().sum()) for one in self.model.parameters()]
        gradient = (
            None if self.model is None or self.model.head.bias.grad is None else self.model.head.bias.grad.tolist()
        )
        self.calls.append((*what, held, gradient))

    def before_forward(self, trainer_step, batch):
        self.note("before_forward", trainer_step, batch[0].tolist())

    def after_backward(self, model, scale):
        self.model = model
        self.note("after_backward", scale)

    def before_update(self, model): ...  # the device may leave the update out after it

    def after_update(self, model, info):
        self.note("after_update", seen(info))

    def on_nonfinite(self, broken):
        self.note("on_nonfinite", broken.step, broken.scale, broken.factor, broken.batch[0].tolist())


@pytest.mark.parametrize("policy", ["fp16-mixed", "bf16-true"])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("alone", [False, True], ids=["told", "asked"])
def test_a_watch_is_told_the_same_once_the_next_passes_are_queued(accumulate, alone, policy):
    """Whoever asks for a decision before the watch is told of it changes nothing of what it is told."""
    calls = []
    for late in (False, True):
        watch = Noted()
        trainer = trainer_of("adamw", policy, late=late, accumulate=accumulate, watch=watch)
        run(trainer, 0, 26, read_at_once=alone)
        trainer.finish()
        calls.append(watch.calls)
    at_once, late = calls
    told = ("after_update", "on_nonfinite")
    assert {call[0] for call in at_once} == {"before_forward", "after_backward", *told}
    assert all(call[-1] is not None for call in at_once if call[0] in told)
    if (
        policy == "bf16-true"
    ):  # a watch may ask by what the weights should have moved: it is told with the gradients there
        assert str(late) == str(at_once)
        return
    expected = list(at_once)
    for place in [at for at, call in enumerate(expected) if call[0] in told and at + 1 < len(expected)]:
        update, begun = expected[place : place + 2]
        assert begun[0] == "before_forward"
        expected[place : place + 2] = begun, update
    assert [call[0] for call in late] == [call[0] for call in expected]
    kept = [[call[1:-1] for call in one if call[0] in told] for one in calls]  # the weights too
    assert str(kept[1]) == str(kept[0])


def test_a_watch_hears_of_a_batch_how_many_updates_were_made_at_most():
    steps = {}
    for late in (False, True):
        watch = Noted()
        run(trainer_of("adamw", late=late, watch=watch), 2, 7)  # the second and the third update are left out
        steps[late] = [call[1] for call in watch.calls if call[0] == "before_forward"]
    assert steps == {False: [0, 1, 1, 1, 2], True: [0, 1, 2, 2, 2]}


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("level", ["cheap", "deep"])
def test_the_doctor_comes_by_the_name_of_its_level_and_reads_the_same_late(level, accumulate):
    records = []
    for late in (False, True):
        trainer = trainer_of(late=late, watch=level, accumulate=accumulate)
        run(trainer, 0, 26)
        trainer.finish()
        assert trainer.watch.close().verdict.sentences
        records.append(trainer.watch.record())
    assert [one.skipped for one in records[0].readings].count(True) == (6 if accumulate == 1 else 4)
    assert {one.part for one in records[0].series} >= {Part.WEIGHT, Part.UPDATE, Part.RATIO}
    assert str(records[1].readings) == str(records[0].readings)
    assert str(records[1].series) == str(records[0].series)


def test_a_doctor_that_samples_every_update_keeps_them_apart():
    records = []
    for late in (False, True):
        trainer = trainer_of(late=late)
        trainer.watch = Doctor(trainer.model, "deep", every=1, precision=trainer.precision)
        run(trainer, 9, 15)
        trainer.finish()
        trainer.watch.close()
        records.append(trainer.watch.record())
    for part in Part:
        counted = [{one.layer: list(one.steps) for one in record.series if one.part is part} for record in records]
        assert counted[0] == counted[1], part
        if part not in (Part.FORWARD, Part.BACKWARD):
            continue
        assert set(map(tuple, counted[0].values())) == {(0, 1, 2, 3, 4, 5)}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_replay_between_two_passes_finds_the_same_and_leaves_no_trace(accumulate):
    """The doctor runs a broken step again while gradients of the next are there."""
    events, states = [], []
    for late, watch in ((False, "cheap"), (True, "cheap"), (True, None)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.BatchNorm1d(64), nn.Linear(64, 3))
        policy = precision("fp16-mixed", loss_scale=StaticScale(256.0))
        optimizer = OPTIMIZERS["adamw"](model.parameters())
        trainer = Trainer(model, optimizer, cross_entropy, precision=policy, accumulate=accumulate, watch=watch)
        trainer._settles_late = late
        for number in range(10):
            inputs = torch.randn(6, 4, generator=torch.Generator().manual_seed(number)) * (1e6 if number == 5 else 1.0)
            trainer.step((inputs, inputs[:, :3].argmax(1)))
        trainer.finish()
        assert trainer.skipped == 1
        states.append(copy.deepcopy(model.state_dict()))
        events.append([] if watch is None else [event.model_dump() for event in trainer.watch.events])
    (event,) = events[0]
    assert (event["cause"]["layer"], event["step"]) == ("0", 5 // accumulate)
    assert events[1] == events[0]
    assert same(states[1], states[0])
    assert same(states[2], states[0])


def test_patience_ends_with_the_step_after_whoever_reads_before():
    for read in (lambda info: None, lambda info: info.skipped):
        trainer = trainer_of(late=True)
        trainer._books._rule = StaticScale(256.0, patience=2)
        infos = [fed(trainer, 3), fed(trainer, 4)]
        read(infos[-1])
        with pytest.raises(
            TrainingError, match=r"2 updates in a row .* \(nan in the gradient of second.bias, step 0\)"
        ):
            fed(trainer, 0)
        assert [info.skipped for info in infos] == [True, True]
        assert trainer.skipped == len(trainer.ledger) == 2
        assert fed(trainer, 0).updated


@pytest.mark.parametrize("place", ["flush", "discard", "finish", "state_dict"])
def test_a_ledger_that_cannot_be_written_says_so_late_too(tmp_path, place):
    trainer = trainer_of(late=True)
    trainer.ledger.write_to(tmp_path / "missing" / "skips.jsonl")
    info = fed(trainer, 3)
    assert info.skipped
    with pytest.raises(OutputError, match="skip ledger"):
        READERS[place](trainer, info)
    READERS[place](trainer, info)
    assert (trainer.skipped, trainer.scale) == (1, 2.0**10)
    trainer.ledger.write_to(tmp_path / "skips.jsonl")
    assert fed(trainer, 4).skipped
    assert (trainer.skipped, trainer.scale) == (2, 2.0**9)  # with a hysteresis of 2, as on ranks that write no file


@pytest.mark.parametrize("late", [False, True], ids=["at-once", "late"])
@pytest.mark.parametrize("policy", ["bf16-true", "bf16-true-kahan"])
def test_an_update_that_is_left_out_changes_no_bit_of_bf16_weights(late, policy):
    """What rounding cut off is half the spacing of its weight: added and rounded again, it would move every odd one."""
    trainer = trainer_of(policy=policy, late=late)
    for number in range(3):
        fed(trainer, number)
    before = copy.deepcopy(trainer.state_dict())
    for lost in before["rounding"]["lost"]:
        lost.copy_(torch.full_like(lost, 2.0**-9))
    trainer.load_state_dict(before)
    before = copy.deepcopy(trainer.state_dict())
    for fault in (3, 4):
        assert fed(trainer, fault).skipped
    after = trainer.state_dict()
    assert after["counters"] == {"steps": 3, "skipped": 2}
    ours = {"counters", "scale", "unit"}
    batch_norm = {name for name in after["model"] if "running" in name or "tracked" in name}
    for state in (before, after):
        state["model"] = {name: one for name, one in state["model"].items() if name not in batch_norm}
    assert same(*({key: state[key] for key in state.keys() - ours} for state in (before, after)))


def test_an_overflow_of_the_loss_alone_names_no_layer():
    trainer = trainer_of(late=True)
    finite = torch.tensor(1e30)
    trainer.loss = lambda outputs, targets: cross_entropy(outputs, targets) + (finite * finite - finite).detach()
    assert fed(trainer, 0).skipped
    assert (trainer.ledger[0].layers, trainer.ledger[0].kind) == ((), "inf")


@pytest.mark.parametrize("late", [False, True], ids=["at-once", "late"])
@pytest.mark.parametrize("broken", [False, True], ids=["made", "left-out"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_after_a_watch_that_fails_the_next_window_closes_as_ever(late, broken, accumulate):
    class Failing(Watch):
        told = 0

        def after_update(self, model, info):
            self.told += 1
            if self.told == 1:
                raise OSError("no room")

        def on_nonfinite(self, broken):
            self.after_update(None, None)

    trainer = trainer_of(late=late, watch=Failing(), accumulate=accumulate)

    def closed() -> None:
        for number in [3] * accumulate if broken else [0] * accumulate:
            fed(trainer, number)
        trainer.finish()

    with pytest.raises(OSError, match="no room"):
        closed()
    assert (trainer.steps, trainer.skipped) == ((0, 1) if broken else (1, 0))
    assert len(trainer.ledger) == broken
    infos = [fed(trainer, number) for number in [1] * accumulate]
    assert [info.closed for info in infos] == [False] * (accumulate - 1) + [True]
    assert infos[-1].updated


@pytest.mark.parametrize("late", [False, True], ids=["at-once", "late"])
def test_an_update_that_fails_is_not_counted(late):
    trainer = trainer_of(late=late)
    fed(trainer, 0)
    failing = trainer.optimizer.register_step_pre_hook(lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fed(trainer, 1)
    failing.remove()
    assert not {"grad_scale", "found_inf"} & vars(trainer._optimizer).keys()
    trainer.discard()
    assert (trainer.steps, trainer.skipped, trainer.schedule.last_epoch) == (1, 0, 1)
    assert fed(trainer, 2).step == 2


@pytest.mark.parametrize("optimizer", ["adamw", "own"])
@pytest.mark.parametrize("default", [{"dtype": torch.bfloat16}, {"dtype": torch.float64}, {"device": "meta"}], ids=str)
def test_what_a_program_makes_tensors_of_by_default_changes_nothing(optimizer, default):
    runs = []
    for change in (False, True):
        trainer = trainer_of(optimizer, late=False)
        batches = [torch.randn(6, 4, generator=torch.Generator().manual_seed(number)) for number in range(6)]
        dtype = torch.get_default_dtype()
        try:
            torch.set_default_dtype(default.get("dtype", dtype) if change else dtype)
            torch.set_default_device(default.get("device") if change else None)
            trainer._settling = type(trainer._settling)(trainer._books, trainer.device)
            trainer._settles_late = True
            for number, inputs in enumerate(batches):
                trainer.model.fault = FAULTS.get(number, 0.0)
                trainer.step((inputs, inputs[:, :3].argmax(1)))
            trainer.finish()
        finally:
            torch.set_default_dtype(dtype)
            torch.set_default_device(None)
        runs.append([*trainer.model.parameters(), list(trainer.ledger)])
    assert {one.kind for one in runs[0][-1]} == {"inf", "nan"}
    assert same(runs[1], runs[0])

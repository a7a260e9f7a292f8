"""Several processes against one: replicated and sharded, in checkpoints, and when one of them is lost."""

from __future__ import annotations

import errno
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks_at_work import COURSES, Net, continued, course, saved_halfway, whole
from safetensors import SafetensorError
from small_runs import free_ports
from torch import nn

from narrowcast.errors import DeviceError, NarrowcastError, OutputError, TrainingError
from narrowcast.training import checkpoint, checkpoint_folder
from narrowcast.training.distributed import Ranks, replicate
from narrowcast.training.sharding import shard
from narrowcast.training.trainer import Trainer

PROGRAM = Path(__file__).with_name("ranks_at_work.py")
HELD = ["replicated", "sharded"]
#: Relative differences to one process: sums in another order, and with BF16 and FP16 products also roundings that flip.
ROUNDING = {"weighted": 1e-5, "mean": 1e-5, "windows": 1e-5, "bf16": 2e-2, "fp16": 3e-3, "narrow": 2e-2}
ROUNDING |= {"narrow plain": 3e-2, "narrow kahan": 3e-2, "narrow stochastic": 3e-2}


class Processes:
    """What each rank saw, and how it ended."""

    def __init__(self, place: Path) -> None:
        done = subprocess.run(
            [sys.executable, str(PROGRAM), str(place), *map(str, free_ports(4))],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        answers = [place / f"seen-{rank}.json" for rank in range(3)]
        assert all(one.exists() for one in answers), done.stdout
        self.codes: list[int] = json.loads((place / "codes.json").read_text())
        self.seen: list[dict[str, Any]] = [json.loads(one.read_text()) for one in answers]
        self.place = place

    def two(self, name: str) -> dict[str, Any]:
        """Return what both of two ranks saw, which must be the same."""
        first, second = (self.seen[rank]["two"][name] for rank in range(2))
        assert first == second
        return first


@pytest.fixture(scope="module")
def halfway(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """A checkpoint of one process, and how it went on."""
    place = tmp_path_factory.mktemp("ranks")
    return place, saved_halfway(Ranks(), "", place / "one")["seen"]


@pytest.fixture(scope="module")
def tied_halfway(halfway: tuple[Path, list[Any]]) -> list[Any]:
    """How a model with tied weights went on in one process, after a checkpoint."""
    return saved_halfway(Ranks(), "", halfway[0] / "tied-one", tied=True)["seen"]


@pytest.fixture(scope="module")
def processes(halfway: tuple[Path, list[Any]], tied_halfway: list[Any]) -> Processes:
    return Processes(halfway[0])


def close(found: Any, expected: Any, relative: float) -> bool:
    found, expected = (torch.tensor(one, dtype=torch.float64) for one in (found, expected))
    return torch.allclose(found, expected, rtol=relative, atol=relative * float(expected.abs().max()))


@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("name", COURSES)
def test_two_processes_train_as_one_does(processes: Processes, name: str, held: str) -> None:
    one = course(Ranks(), "", *COURSES[name])
    found = processes.two(f"{held} {name}")
    assert len(one["seen"]) == (3 if COURSES[name][1] == 2 else 5)  # the last window may hold fewer micro-batches
    assert close(found["seen"], one["seen"], ROUNDING[name])
    for key, values in one["weights"].items():
        assert close(found["weights"][key], values, ROUNDING[name]), key


def test_weights_that_come_together_in_bf16_train_alike(processes: Processes) -> None:
    one = course(Ranks(), "", *COURSES["bf16"])
    found = processes.two("sharded narrow")
    assert close(found["seen"], one["seen"], ROUNDING["narrow"])
    assert found["seen"] != processes.two("sharded bf16")["seen"]  # norms and biases were rounded too


@pytest.mark.parametrize("held", HELD)
def test_an_overflow_on_one_rank_is_skipped_by_all_and_the_ledger_names_it(processes: Processes, held: str) -> None:
    found = processes.two(f"{held} overflow")
    assert found["skipped"] == [False, True, False, False]
    assert found["updated"] == [False, False, False, True]
    assert found["untouched"]
    assert found["rate"] == [pytest.approx(0.02 * 0.95)]
    step, rank, kind, layers = found["ledger"]
    assert (step, rank, found["skips"]) == (0, 1, 1)
    assert kind in ("inf", "nan")
    assert layers[0].startswith("head")
    assert set(layers) == {name for name, _ in Net().named_parameters()}


@pytest.mark.parametrize("held", HELD)
def test_a_resumed_run_of_two_goes_on_bit_for_bit(processes: Processes, held: str) -> None:
    found = processes.two(f"{held} resumed")
    assert found["resumed"] == found["straight"]
    parts = ["shard-00001-model-00001-of-00001.safetensors", "shard-00002-model-00001-of-00001.safetensors"]
    written = parts if held == "sharded" else parts[:1]
    assert found["files"] == ["manifest.json", *written, "state.json"]


@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("update", ["kahan", "stochastic"])
def test_a_resumed_run_with_bf16_weights_goes_on_bit_for_bit(processes: Processes, held: str, update: str) -> None:
    found = processes.two(f"{held} resumed {update}")
    assert found["resumed"] == found["straight"]


@pytest.mark.parametrize("held", HELD)
def test_one_process_goes_on_from_a_checkpoint_of_two(
    processes: Processes, halfway: tuple[Path, list[Any]], held: str
) -> None:
    expected = halfway[1]
    folder = processes.place / f"{held}-halfway"
    found = checkpoint.load_latest(folder)
    assert found is not None
    one = checkpoint.load_latest(processes.place / "one")
    assert one is not None
    for key, value in one.state["trainer"]["model"].items():
        assert torch.allclose(found.state["trainer"]["model"][key], value, rtol=1e-4, atol=1e-5), key
    assert close(processes.two(f"{held} halfway")["seen"], expected, 1e-4)
    assert close(continued(Ranks(), "", folder)["seen"], expected, 1e-4)


@pytest.mark.parametrize("held", HELD)
def test_two_processes_go_on_from_a_checkpoint_of_one(
    processes: Processes, halfway: tuple[Path, list[Any]], held: str
) -> None:
    found = processes.two(f"{held} from one")
    assert close(found["seen"], halfway[1], 1e-5)
    assert not found["own"]


def test_sharded_processes_go_on_from_a_replicated_checkpoint(
    processes: Processes, halfway: tuple[Path, list[Any]]
) -> None:
    found = processes.two("sharded from replicated")
    assert close(found["seen"], halfway[1], 1e-4)
    assert found["own"]


@pytest.mark.parametrize("held", HELD)
def test_three_processes_go_on_from_a_sharded_checkpoint_of_two(
    processes: Processes, halfway: tuple[Path, list[Any]], held: str
) -> None:
    first, second, third = (seen["three"][f"{held} of two"] for seen in processes.seen)
    assert first == second == third
    assert close(first["seen"], halfway[1], 1e-4)
    assert not first["own"]


def test_tied_weights_are_saved_once_and_resumed_by_any_number_of_processes(
    processes: Processes, tied_halfway: list[Any]
) -> None:
    found = processes.two("tied")
    stored = found["stored"]
    assert stored["up.weight"] == stored["down.weight"] == "trainer/model/up.weight"
    assert stored["gain"] == stored["scale"]
    assert len(set(stored.values())) == len(stored) - 2
    assert found["sharded"] == found["straight"]
    for held in ("straight", "replicated", "from one"):
        assert close(found[held], tied_halfway, 1e-4), held
    for seen in processes.seen:
        assert close(seen["three"]["tied of two"]["seen"], tied_halfway, 1e-4)
    folder = processes.place / "tied-halfway"
    assert close(continued(Ranks(), "", folder, tied=True)["seen"], tied_halfway, 1e-4)
    latest = checkpoint.load_latest(folder)
    assert latest is not None
    assert latest.state["trainer"]["model"]["down.weight"] is latest.state["trainer"]["model"]["up.weight"]


def test_sharded_tensors_that_overlap_are_saved_each_for_itself(processes: Processes) -> None:
    assert processes.two("overlapping") == {"all": [0, 1, 2, 3, 10, 11, 12, 13], "some": [1, 2, 11, 12]}


@pytest.mark.parametrize(
    ("problem", "kind", "advice"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), OutputError, "free space or name another folder"),
        (
            SafetensorError("I/O error: No space left on device (os error 28)"),
            OutputError,
            "free space or name another",
        ),
        (OSError(errno.EACCES, "Permission denied"), OutputError, "name another folder"),
        (RuntimeError("Some tensors share memory\nand more"), TrainingError, "checkpoints that are there still hold"),
    ],
    ids=["full", "full_in_safetensors", "no_permission", "not_the_system"],
)
def test_the_advice_for_a_failed_save_fits_its_cause(
    problem: Exception, kind: type[NarrowcastError], advice: str
) -> None:
    error = checkpoint_folder.not_written(Path("runs"), problem, "rank 1: ")
    assert type(error) is kind
    assert error.what.startswith("checkpoint in runs cannot be written: rank 1: ")
    assert "\n" not in error.what
    assert error.next_step.startswith(advice)


def test_a_save_that_fails_fails_on_all_ranks_and_leaves_what_was_there(processes: Processes) -> None:
    first, second = (seen["two"]["failed saves"] for seen in processes.seen[:2])
    for found in (first, second):
        assert "there is a file where a folder should be" in found["blocked"]
        assert "cannot be written: rank 1: " in found["one rank"]
        assert "s a directory" in found["one rank"]
        assert found["left"] == ["step-00000001", "step-00000002"]
        assert found["loaded"] == 1
    assert len(first["warned"]) == 1
    assert "shard-00002" in first["warned"][0]
    assert second["warned"] == []


def test_no_pickle_is_read(processes: Processes, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a pickle was read")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse)
    for folder in ("one", "sharded-halfway", "replicated-halfway"):
        assert checkpoint.load_latest(processes.place / folder) is not None


def test_parameters_without_gradient_are_told_or_waited_for_on_request(processes: Processes) -> None:
    found = processes.two("partial")
    assert "some parameters of the replicas had no part in the loss" in found["as it is"]
    assert found["told"] == found["sharded"] == "nothing was raised"


@pytest.mark.parametrize("held", HELD)
def test_all_ranks_begin_with_the_weights_and_buffers_of_rank_0(processes: Processes, held: str) -> None:
    found = processes.two("seeded apart")[held]
    torch.manual_seed(0)
    net = Net()
    net.register_buffer("mask", torch.rand(3, 2).t() > 0.5)
    assert found == {name: whole(one) for name, one in net.state_dict().items()}


def test_a_rank_that_does_not_answer_is_given_up_after_the_timeout(processes: Processes) -> None:
    assert (
        "another process of this training is gone, or has not answered for 2 s" in processes.seen[0]["silent"]["said"]
    )


def test_a_rank_that_is_killed_ends_the_others_with_an_error(processes: Processes) -> None:
    assert processes.codes == [0, -9, 0]
    assert "another process of this training is gone" in processes.seen[0]["killed"]["said"]
    assert "--resume" in processes.seen[0]["killed"]["said"]


def test_ranks_tell_each_other_what_they_have(processes: Processes) -> None:
    found = processes.two("differing")
    assert found["gathered"] == [{"rank": 0, "text": ""}, {"rank": 1, "text": "é"}]
    assert found["bytes"] == [0, 3]
    assert "the seed is 0 on rank 0 and 1 on rank 1" in found["same"]


def test_a_process_alone_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with Ranks.from_environment("cpu") as ranks:
        assert (ranks.rank, ranks.world, ranks.mesh) == (0, 1, None)
        value = torch.tensor([1.0, 2.0])
        assert ranks.sum(value) is value
        assert ranks.maximum(value) is value
        assert ranks.gather({"a": 1}) == [{"a": 1}]
        ranks.check_same(1, "one")
        net = nn.Linear(2, 2)
        assert replicate(net, ranks) is net
        assert shard(net, ranks) is net
        assert not torch.distributed.is_initialized()


class Learned(nn.Module):
    """A loss with a temperature of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(()))

    def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return (outputs / self.temperature - targets).square().mean()


def test_parameters_outside_of_what_ranks_share_are_refused() -> None:
    model, loss = nn.Linear(2, 2), Learned()
    optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=0.1)
    Trainer(model, optimizer, loss, ranks=Ranks())
    with pytest.raises(TrainingError, match=r"loss\.temperature belongs to the loss"):
        Trainer(model, optimizer, loss, ranks=Ranks(world=2))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"RANK": "0"}, "missing: WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK=2, LOCAL_RANK=0, WORLD_SIZE=2"),
        ({"RANK": "x", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK=x"),
    ],
    ids=["missing", "beyond", "no_number"],
)
def test_variables_that_contradict_each_other_are_named(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], said: str
) -> None:
    rest = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"} if len(given) > 1 else {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (given | rest).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(TrainingError, match=said):
        Ranks.from_environment("cpu")


def test_a_process_without_a_gpu_of_its_own_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = {"RANK": "0", "WORLD_SIZE": "64", "LOCAL_RANK": "63", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in numbers.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(DeviceError, match="process 63 of this machine has no GPU"):
        Ranks.from_environment("cuda")


def test_others_that_do_not_come_are_waited_for_as_long_as_told(monkeypatch: pytest.MonkeyPatch) -> None:
    (port,) = free_ports(1)
    numbers = {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in numbers.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(TrainingError, match=r"has not answered for 0\.5 s"):
        Ranks.from_environment("cpu", timeout_s=0.5)

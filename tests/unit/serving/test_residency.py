"""Weights that are on a device or in host memory, as its budget allows."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from narrowcast.serving.refusals import MemoryBudgetError
from narrowcast.serving.workers.residency import DeviceMemory, Movable


class Weights(Movable):
    """Weights on an imagined device that counts what is on it."""

    on_device = 0
    most = 0
    lock = threading.Lock()

    def __init__(self, size: int = 10, seconds: float = 0.0) -> None:
        self.size = size
        self.seconds = seconds
        self.moves: list[str] = []
        self.here = False
        self.refuse = False

    def to_device(self) -> None:
        time.sleep(self.seconds)
        if self.refuse:
            raise RuntimeError("out of memory")
        assert not self.here
        self.here = True
        self.moves.append("device")
        with Weights.lock:
            Weights.on_device += self.size
            Weights.most = max(Weights.most, Weights.on_device)

    def to_host(self) -> None:
        time.sleep(self.seconds)
        assert self.here
        self.here = False
        self.moves.append("host")
        with Weights.lock:
            Weights.on_device -= self.size


@pytest.fixture(autouse=True)
def _empty_device() -> None:
    Weights.on_device = Weights.most = 0


def memory_of(budget: int | None, *models: Weights) -> DeviceMemory:
    memory = DeviceMemory(budget)
    for number, model in enumerate(models):
        memory.add(model, model.size, f"model {number}")
    return memory


def use(memory: DeviceMemory, model: Weights) -> None:
    with memory.resident(model):
        assert model.here


def test_weights_move_to_the_device_and_stay_there() -> None:
    a, b = Weights(), Weights()
    memory = memory_of(20, a, b)
    assert memory.used == 0
    for model in (a, b, a, b):
        use(memory, model)
    assert (a.moves, b.moves) == (["device"], ["device"])
    assert memory.used == Weights.on_device == 20


def test_the_least_recently_used_goes_to_host_memory_and_comes_back() -> None:
    a, b, c = Weights(), Weights(), Weights()
    memory = memory_of(20, a, b, c)
    for model in (a, b, a, c):
        use(memory, model)
    assert b.moves == ["device", "host"]
    assert a.here
    assert memory.evictions == 1
    use(memory, b)
    assert a.moves == ["device", "host"]
    assert Weights.most == 20


def test_what_is_in_use_stays_and_others_wait_for_it() -> None:
    a, b = Weights(), Weights()
    memory = memory_of(10, a, b)
    entered = threading.Event()

    def wait_for_room() -> None:
        entered.set()
        use(memory, b)

    waiting = threading.Thread(target=wait_for_room)
    with memory.resident(a):
        waiting.start()
        assert entered.wait(10)
        time.sleep(0.05)
        assert b.moves == []
        assert a.here
    waiting.join(10)
    assert b.moves == ["device"]
    assert a.moves == ["device", "host"]


def test_simultaneous_uses_move_the_weights_once() -> None:
    a = Weights(seconds=0.05)
    memory = memory_of(None, a)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: use(memory, a), range(32)))
    assert a.moves == ["device"]


def test_weights_over_the_budget_are_refused_and_others_stay() -> None:
    a = Weights()
    memory = memory_of(15, a)
    use(memory, a)
    with pytest.raises(MemoryBudgetError, match=r"too large takes 16 B .* budget of 15 B"):
        memory.add(Weights(16), 16, "too large")
    assert a.here


def test_a_move_that_fails_gives_the_room_back() -> None:
    a, b = Weights(), Weights()
    memory = memory_of(10, a, b)
    use(memory, a)
    b.refuse = True
    with pytest.raises(RuntimeError, match="out of memory"):
        use(memory, b)
    assert memory.used == 0
    b.refuse = False
    use(memory, b)
    use(memory, a)
    assert memory.used == 10


def test_a_model_that_is_removed_leaves_room() -> None:
    a, b = Weights(), Weights()
    memory = memory_of(10, a, b)
    use(memory, a)
    memory.remove(a)
    memory.remove(a)
    use(memory, b)
    assert a.moves == ["device"], "whoever removes it decides what becomes of its weights"
    assert memory.used == 10


def test_many_threads_and_models_never_exceed_the_budget() -> None:
    models = [Weights(size, 0.0005) for size in (4, 7, 10, 13, 9, 5)]
    memory = memory_of(25, *models)

    def client(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for index in rng.integers(0, len(models), 40):
            with memory.resident(models[index]):
                assert models[index].here
                time.sleep(0.0002)
                assert models[index].here

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(client, range(6)))
    assert Weights.most <= 25
    assert memory.evictions > 10
    assert memory.used == Weights.on_device == sum(model.size for model in models if model.here)

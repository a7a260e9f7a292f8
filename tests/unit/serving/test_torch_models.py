"""PyTorch modules that are served, on the CPU and on a CUDA device."""

from __future__ import annotations

import asyncio

import ml_dtypes
import numpy as np
import pytest
import torch
from serving_models import FOURS, spec
from torch import nn

from narrowcast.serving.catalogue import Catalogue, Hosting
from narrowcast.serving.refusals import MemoryBudgetError
from narrowcast.serving.repository import Repository
from narrowcast.serving.scheduling.queue import Batching, Job
from narrowcast.serving.scheduling.scheduler import Settings
from narrowcast.serving.signature import Signature
from narrowcast.serving.workers.residency import DeviceMemory
from narrowcast.serving.workers.sources import Placement
from narrowcast.serving.workers.torch_models import TorchModel, torch_source

torch.set_num_threads(1)
BYTES = (16 + 4) * 4  # of the weights and biases of a layer from 4 to 4


def layer(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Linear(4, 4)


def expected(seed: int, rows: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return layer(seed)(torch.from_numpy(rows)).numpy()


def test_a_module_is_served_from_a_repository_within_the_devices_budget() -> None:
    memory = DeviceMemory(2 * BYTES)
    sources = {f"net{seed}": torch_source(lambda seed=seed: layer(seed), FOURS, memory, "cpu") for seed in range(3)}
    rows = np.arange(8, dtype=np.float32).reshape(2, 4)

    async def main() -> None:
        catalogue = Catalogue(Repository(sources=sources), Hosting(Placement.THREAD, settings=Settings(Batching(8))))
        await catalogue.load_all()
        assert catalogue.memory.used == 3 * BYTES
        assert memory.used == 0
        for seed in (0, 1, 2, 0):
            job: Job = catalogue.find(f"net{seed}").scheduler.submit({"x": rows}, 2)
            while not job.finished:
                await asyncio.sleep(0.001)
            assert job.outputs is not None
            np.testing.assert_allclose(job.outputs["y"], expected(seed, rows), rtol=1e-6)
        assert memory.used == 2 * BYTES
        assert memory.evictions == 2
        await catalogue.close()

    asyncio.run(main())


def test_outputs_may_come_in_order_or_by_name() -> None:
    signature = Signature((spec("x", -1, 4),), (spec("a", -1, 4), spec("b", -1, 4)), batched=True)

    class Two(nn.Module):
        def __init__(self, named: bool) -> None:
            super().__init__()
            self.named = named

        def forward(self, x: torch.Tensor) -> object:
            return {"b": -x, "a": x, "c": x} if self.named else (x, -x)

    for named in (False, True):
        given = TorchModel(Two(named), signature, DeviceMemory(), "cpu").run({"x": np.ones((1, 4), np.float32)})
        assert {name: array[0, 0] for name, array in given.items()} == {"a": 1, "b": -1}


def test_bfloat16_goes_in_and_comes_out() -> None:
    signature = Signature((spec("x", -1, datatype="BF16"),), (spec("y", -1, datatype="BF16"),), batched=True)
    given = np.array([1.5, -3.0], ml_dtypes.bfloat16)
    outputs = TorchModel(nn.ReLU(), signature, DeviceMemory(), "cpu").run({"x": given})
    assert outputs["y"].dtype == ml_dtypes.bfloat16
    assert outputs["y"].tolist() == [1.5, 0.0]
    assert given.tolist() == [1.5, -3.0]


def test_tied_weights_are_counted_once_and_too_many_are_refused() -> None:
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    assert TorchModel(tied, FOURS, DeviceMemory(), "cpu").size == (16 + 4 + 4) * 4
    with pytest.raises(MemoryBudgetError, match="net takes 80 B"):
        TorchModel(layer(0), FOURS, DeviceMemory(BYTES - 1), "cpu", "net")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_weights_leave_a_cuda_device_and_come_back() -> None:
    size = (1024 * 1024 + 1024) * 4
    memory = DeviceMemory(2 * size)
    wide = Signature((spec("x", -1, 1024),), (spec("y", -1, 1024),), batched=True)
    modules = [nn.Linear(1024, 1024) for _ in range(3)]
    rows = np.random.default_rng(0).standard_normal((4, 1024)).astype(np.float32)
    with torch.inference_mode():
        wanted = [module(torch.from_numpy(rows)).numpy() for module in modules]
    models = [TorchModel(module, wide, memory, "cuda") for module in modules]
    before = torch.cuda.memory_allocated()
    for index in (0, 1, 2, 0, 1, 2):
        np.testing.assert_allclose(models[index].run({"x": rows})["y"], wanted[index], rtol=1e-3, atol=1e-3)
        assert torch.cuda.memory_allocated() - before <= 2.2 * size
    assert memory.evictions == 4
    for model in models:
        model.close()
    assert memory.used == 0
    assert torch.cuda.memory_allocated() - before < size

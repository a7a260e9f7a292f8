"""PyTorch modules as models, with their weights on a device while it has room for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray

from narrowcast.serving.signature import Signature, Tensors
from narrowcast.serving.workers.base import LoadedModel
from narrowcast.serving.workers.residency import DeviceMemory, Movable
from narrowcast.serving.workers.sources import FunctionSource

__all__ = ["TorchModel", "torch_source"]

_BF16 = np.dtype(ml_dtypes.bfloat16)
Given = torch.Tensor | Sequence[torch.Tensor] | Mapping[str, torch.Tensor]


class TorchModel(LoadedModel, Movable):
    """A module that takes tensors in the order of its inputs, and gives one, several in order, or several by name.

    Args:
        module: The module, in evaluation mode from now on. Its weights are moved as they are needed.
        signature: What it takes and gives.
        memory: The memory of the device, which several models share.
        device: Where it runs.
        name: What messages call it.

    Raises:
        MemoryBudgetError: Its weights are more than the device's budget.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        signature: Signature,
        memory: DeviceMemory,
        device: str | torch.device,
        name: str = "a module",
    ) -> None:
        self.signature = signature
        self._module = module.eval()
        self._memory = memory
        self._device = torch.device(device)
        self._name = name
        held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in _weights(module)}
        self.size = sum(held.values())
        self.to_host()
        memory.add(self, self.size, name)

    def to_device(self) -> None:
        try:
            self._module.to(self._device)
        except BaseException:
            self.to_host()
            raise

    def to_host(self) -> None:
        self._module.to("cpu")

    def run(self, inputs: Tensors) -> Tensors:
        with self._memory.resident(self), torch.inference_mode():
            given = [_to_torch(inputs[spec.name]).to(self._device) for spec in self.signature.inputs]
            return {name: _to_numpy(tensor) for name, tensor in self._named(self._module(*given)).items()}

    def _named(self, given: Given) -> Mapping[str, torch.Tensor]:
        """Return what the module gave by the names of its outputs."""
        if isinstance(given, Mapping):
            return {spec.name: given[spec.name] for spec in self.signature.outputs}
        tensors = [given] if isinstance(given, torch.Tensor) else given
        return {spec.name: tensor for spec, tensor in zip(self.signature.outputs, tensors, strict=True)}

    def close(self) -> None:
        self._memory.remove(self)
        self.to_host()


def torch_source(
    module: Callable[[], torch.nn.Module],
    signature: Signature,
    memory: DeviceMemory,
    device: str | torch.device,
    name: str = "a module",
) -> FunctionSource:
    """Return a source of a module, for a repository.

    Args:
        module: Makes the module, each time that the model is loaded.
        signature: What it takes and gives.
        memory: The memory of the device, which several models share.
        device: Where it runs.
        name: What messages call it.
    """
    return FunctionSource(lambda: TorchModel(module(), signature, memory, device, name))


def _weights(module: torch.nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


def _to_torch(array: NDArray[Any]) -> torch.Tensor:
    """Return an array as a tensor of its own memory, which clients' requests may not be written to through."""
    if array.dtype == _BF16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def _to_numpy(tensor: torch.Tensor) -> NDArray[Any]:
    host = tensor.detach().cpu().contiguous()
    return host.view(torch.int16).numpy().view(_BF16) if host.dtype == torch.bfloat16 else host.numpy()

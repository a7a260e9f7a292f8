"""Optimizers by name: PyTorch's own, and Adam with states of 8 bits as bitsandbytes keeps them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from narrowcast.errors import ModelError

__all__ = ["OPTIMIZERS", "Adam8bit", "optimizer"]

BLOCK = 256  # elements that share a scale
SMALLEST = 4096  # elements of a tensor below which its states stay FP32


class Adam8bit(torch.optim.Optimizer):
    """What 8-bit Adam allocates: two states of one byte an element, with an FP32 scale for each block of 256.

    Tensors below 4,096 elements keep FP32 states. The step is one kernel and allocates nothing. The two maps of codes,
    256 FP32 numbers each, are shared by all parameters. Nothing is computed: this is for counting memory.

    Source: Dettmers et al., 8-bit Optimizers via Block-wise Quantization (ICLR 2022), section 2; block size and
    smallest tensor as in bitsandbytes.
    """

    def __init__(self, params: Iterable[torch.Tensor]) -> None:
        super().__init__(params, {})
        self._maps: list[torch.Tensor] = []

    def step(self, closure: Any = None) -> Any:
        """Allocate the states of parameters that have gradients and no states yet."""
        for parameter in (one for group in self.param_groups for one in group["params"] if one.grad is not None):
            state = self.state[parameter]
            if state:
                continue
            if parameter.numel() < SMALLEST:
                state["state1"], state["state2"] = (
                    torch.empty_like(parameter, dtype=torch.float32, requires_grad=False) for _ in range(2)
                )
                continue
            self._maps = self._maps or [torch.empty(256, device=parameter.device) for _ in range(2)]
            state["qmap1"], state["qmap2"] = self._maps
            blocks = -(-parameter.numel() // BLOCK)
            for name in ("1", "2"):
                state[f"state{name}"] = torch.empty_like(parameter, dtype=torch.uint8, requires_grad=False)
                state[f"absmax{name}"] = torch.empty(blocks, device=parameter.device)


#: Makes an optimizer from parameters and whether steps go over lists of tensors, as PyTorch does on CUDA by default.
OPTIMIZERS: dict[str, Callable[[list[torch.Tensor], bool], torch.optim.Optimizer]] = {
    "sgd": lambda parameters, foreach: torch.optim.SGD(parameters, lr=0.1, foreach=foreach),
    "momentum": lambda parameters, foreach: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, foreach=foreach),
    "adam": lambda parameters, foreach: torch.optim.Adam(parameters, foreach=foreach),
    "adamw": lambda parameters, foreach: torch.optim.AdamW(parameters, foreach=foreach),
    "adam8bit": lambda parameters, foreach: Adam8bit(parameters),
    "adafactor": lambda parameters, foreach: torch.optim.Adafactor(parameters, foreach=foreach),
}


def optimizer(name: str, parameters: list[torch.Tensor], *, foreach: bool) -> torch.optim.Optimizer:
    """Return an optimizer by its name.

    Args:
        name: One of :data:`OPTIMIZERS`.
        parameters: What it trains.
        foreach: Whether its steps go over lists of tensors, which is faster and needs more memory for a moment.

    Raises:
        ModelError: There is none of that name.
    """
    key = name.strip().casefold().replace("-", "").replace("_", "")
    if key not in OPTIMIZERS:
        raise ModelError(f"optimizer {name!r} is unknown", allowed=", ".join(OPTIMIZERS))
    return OPTIMIZERS[key](parameters, foreach)

"""Networks to be trained and teachers, by reference, and what their data have to look like."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from narrowcast.errors import ModelError
from narrowcast.models.bundled import TorchModel
from narrowcast.models.graph import Graph, TensorInfo
from narrowcast.models.loaders import fresh_module, load_module
from narrowcast.models.reference import Model, ModelRef
from narrowcast.models.runs import Architecture, architecture_of, load_weights, read_weights
from narrowcast.training.config import Network

if TYPE_CHECKING:
    from torch import nn

__all__ = ["inputs_of", "parameters_of", "trainable", "trained"]


def trainable(settings: Network, *, seed: int) -> tuple[TorchModel, Architecture]:
    """Return a network to be trained, and what it is.

    Args:
        settings: A reference, or the folder of an earlier run, whose weights are then gone on from.
        seed: Seed of fresh weights.

    Raises:
        ModelError: The network cannot be found, built or trained.
        RuntimeMissingError: A package that it needs is not installed.
    """
    ref = ModelRef.parse(settings.name)
    if ref.scheme != "run":
        architecture = Architecture(settings.name, settings.arguments, settings.input)
        return _checked(fresh_module(architecture, seed=seed), settings.name), architecture
    if settings.arguments or settings.input is not None:
        raise ModelError(
            f"network {settings.name} is a run, which has its arguments and input already",
            next_step="leave network.arguments and network.input out",
        )
    folder = Path(ref.id)
    architecture, sha256 = architecture_of(folder)
    made = fresh_module(architecture, seed=seed)
    load_weights(made.module, read_weights(folder, sha256), str(folder))
    return _checked(made, settings.name), architecture


def trained(reference: str) -> nn.Module:
    """Return a network with trained weights, to be learnt from.

    Raises:
        ModelError: It cannot be found, is no PyTorch network, or nobody trained it.
        RuntimeMissingError: A package that it needs is not installed.
    """
    made = load_module(ModelRef.parse(reference))
    if made is None or made.random_weights:
        why = "no PyTorch network" if made is None else "a network that nobody trained"
        raise ModelError(
            f"teacher {reference} is {why}",
            allowed="the folder of a training run, a bundled network with weights, or py:MODULE:FUNCTION",
            next_step="train it first: narrowcast train CONFIG",
        )
    return made.module


def inputs_of(made: TorchModel, name: str) -> Model:
    """Return a network as data loaders see it: the names, types and shapes of its inputs, and how images are prepared."""
    infos = [
        TensorInfo(key, np.dtype(str(example.dtype).removeprefix("torch.")), (None, *example.shape[1:]))
        for key, example in zip(made.names, made.examples, strict=True)
    ]
    digest = hashlib.sha256(repr([name, *infos]).encode()).hexdigest()
    graph = Graph(nodes=[], constants={}, inputs=infos, outputs=[])
    return Model(ModelRef.parse(name), graph, b"", digest, made.random_weights, made.image, made.tokenize)


def parameters_of(module: nn.Module) -> int:
    """Return the number of parameters that are trained."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def _checked(made: TorchModel, name: str) -> TorchModel:
    if not parameters_of(made.module):
        raise ModelError(f"network {name} has no parameters to train", next_step="give a network that has some")
    return made

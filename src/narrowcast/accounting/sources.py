"""Where a model to be counted comes from: a way to build it, and inputs to run it on."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from narrowcast.errors import ModelError, RuntimeMissingError
from narrowcast.models.loaders import load_module
from narrowcast.models.reference import ModelRef

__all__ = ["Source", "parse_input", "source"]

_SHAPE = re.compile(r"(?:(?P<name>\w+)=)?(?P<shape>\d+(?:x\d+)*)(?::(?P<dtype>\w+))?")


@dataclass(frozen=True)
class Source:
    """A model that can be built, and example inputs.

    Args:
        name: As the user gave it.
        build: Makes the module; called under a mode in which tensors have no numbers.
        examples: Makes the positional inputs.
        named: Makes the inputs by name.
    """

    name: str
    build: Callable[[], nn.Module]
    examples: Callable[[], tuple[Any, ...]]
    named: Callable[[], dict[str, Any]] = field(default=dict)


def parse_input(text: str) -> tuple[str, tuple[int, ...], torch.dtype]:
    """Return the name (empty without one), shape and dtype that ``[NAME=]1x3x224x224[:DTYPE]`` says.

    Raises:
        ModelError: The text says no shape, or torch has no such dtype.
    """
    found = _SHAPE.fullmatch(text)
    if found is None:
        raise ModelError(f"input {text!r}", allowed="[NAME=]1x3x224x224[:DTYPE], DTYPE float32 unless given")
    dtype = vars(torch).get(found["dtype"] or "float32")
    if not isinstance(dtype, torch.dtype):
        raise ModelError(
            f"input {text!r}: torch has no dtype {found['dtype']!r}", allowed="float32, bfloat16, int64 ..."
        )
    return found["name"] or "", tuple(int(size) for size in found["shape"].split("x")), dtype


def source(reference: str, *, inputs: Sequence[str] = (), tokens: int | None = None, batch: int = 1) -> Source:
    """Return the model that a reference names, with the inputs asked for.

    Args:
        reference: ``timm:``, ``torchvision:``, ``py:``, ``bundled:``, or ``hf:CONFIG_DIR`` (a folder with a
            ``config.json`` of transformers; no weights are needed).
        inputs: Shapes, as :func:`parse_input` takes them; the model's own example with ``batch`` samples unless given.
        tokens: Tokens of a language model.
        batch: Samples.

    Raises:
        ModelError: The model cannot be found, or an input says no shape.
        RuntimeMissingError: A package that the scheme needs is not installed.
    """
    shapes = [parse_input(text) for text in inputs]
    if reference.startswith("hf:"):
        return _transformers(reference, shapes, tokens or 128, batch)
    ref = ModelRef.parse(reference)
    made: dict[str, Any] = {}

    def build() -> nn.Module:
        model = load_module(ref)
        if model is None:
            raise ModelError(f"{reference} is no PyTorch module", allowed="timm:, torchvision:, py:, bundled:, hf:")
        made["examples"] = model.examples
        return model.module

    def examples() -> tuple[Any, ...]:
        if shapes:
            return tuple(torch.empty(shape, dtype=dtype) for name, shape, dtype in shapes if not name)
        return tuple(torch.empty((batch, *example.shape[1:]), dtype=example.dtype) for example in made["examples"])

    return Source(reference, build, examples, lambda: _named(shapes))


def _named(shapes: Sequence[tuple[str, tuple[int, ...], torch.dtype]]) -> dict[str, Any]:
    return {name: torch.empty(shape, dtype=dtype) for name, shape, dtype in shapes if name}


def _transformers(
    reference: str, shapes: Sequence[tuple[str, tuple[int, ...], torch.dtype]], tokens: int, batch: int
) -> Source:
    folder = Path(reference.removeprefix("hf:"))
    try:
        library: Any = importlib.import_module("transformers")
    except ImportError as error:
        raise RuntimeMissingError(
            f"{reference} needs transformers", next_step="install it with: pip install 'narrowcast[examples]'"
        ) from error
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"folder {folder} holds no config.json", allowed="a folder with a configuration of transformers"
        )
    try:
        config = library.AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{folder}/config.json cannot be used: {str(error).splitlines()[0]}") from error
    kind = library.AutoModelForCausalLM
    if type(config) not in kind._model_mapping:
        kind = library.AutoModel

    def examples() -> tuple[Any, ...]:
        if shapes:
            return tuple(torch.empty(shape, dtype=dtype) for name, shape, dtype in shapes if not name)
        return (torch.zeros(batch, tokens, dtype=torch.int64),)

    return Source(reference, lambda: kind.from_config(config), examples, lambda: _named(shapes))

"""Where a model to be counted comes from: a way to count it on inputs that the user describes."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from narrowcast.accounting.graphs.inputs import Given
from narrowcast.accounting.profile import Counted
from narrowcast.errors import ModelError, RuntimeMissingError, choices
from narrowcast.models.loaders import artifact_file, load_module
from narrowcast.models.reference import ModelRef
from narrowcast.models.torch_export import require_torch

if TYPE_CHECKING:
    from torch import nn
    from torch._subclasses.fake_tensor import FakeTensorMode

__all__ = ["GraphSource", "Source", "parse_input", "source"]

_SHAPE = re.compile(r"(?:(?P<name>[^=]+)=)?(?P<shape>\d+(?:x\d+)*)(?::(?P<dtype>\w+))?")
_DTYPES = frozenset(
    """float16 bfloat16 float32 float64 complex64 complex128 int8 int16 int32 int64 uint8 uint16 uint32 uint64 bool
    float8_e4m3fn float8_e5m2""".split()  # noqa: SIM905
)
_ONE = "give one of the two"
_FORMS = "timm:, torchvision:, py:, bundled:, hf:, or a path that ends in .onnx"


@dataclass(frozen=True)
class Source:
    """A PyTorch module that can be built, and example inputs.

    Args:
        name: As the user gave it.
        build: Makes the module; called under a mode in which tensors have no numbers.
        examples: Makes the positional inputs.
        named: Makes the inputs by name.
        config: The configuration of transformers that it was built from, where there is one.
        context: Tokens of the past whose keys and values are there already, for counts of what comes after them; None for none.
    """

    name: str
    build: Callable[[], nn.Module]
    examples: Callable[[], tuple[Any, ...]]
    named: Callable[[], dict[str, Any]] = field(default=dict)
    config: Any = None
    context: int | None = None

    def count(self, *, train: bool = False) -> Counted:
        """Return what one run of the module does.

        Args:
            train: Whether to count forward and backward, else one inference.

        Raises:
            ModelError: The inputs do not fit, or the run depends on numbers.
        """
        from narrowcast.accounting.building import fake_module, in_dtype_of
        from narrowcast.accounting.modules import count_module

        module, mode = fake_module(self.build)
        args, named = in_dtype_of(module, (self.examples(), self.named()))
        if self.context is not None:
            named |= {"past_key_values": past(module, mode, args[0].shape[0], self.context)}
        return count_module(module, args, named, mode=mode, train=train)


@dataclass(frozen=True)
class GraphSource:
    """An ONNX file. Neither PyTorch nor the weights are needed.

    Args:
        name: As the user gave it.
        path: The file.
        inputs: Shapes of its inputs, as far as the user gave them.
        batch: Samples, for axes that are dynamic.
        tokens: Tokens of a language model, likewise; 128 unless given.
    """

    name: str
    path: Path
    inputs: tuple[Given, ...] = ()
    batch: int = 1
    tokens: int | None = None

    def count(self, *, train: bool = False) -> Counted:
        """Return what one run of the graph does.

        Raises:
            ModelError: The file cannot be read, the inputs do not fit, a shape stays open, or ``train`` is asked for.
        """
        from narrowcast.accounting.graphs.walk import count_graph

        if train:
            raise ModelError(
                f"{self.name} is an ONNX graph, which has no backward",
                allowed="inference",
                next_step="count the PyTorch module that it was exported from in training",
            )
        return count_graph(self.path, self.inputs, name=self.name, batch=self.batch, tokens=self.tokens)


def parse_input(text: str) -> Given:
    """Return what ``[NAME=]1x3x224x224[:DTYPE]`` says.

    Raises:
        ModelError: The text says no shape, or there is no such dtype.
    """
    found = _SHAPE.fullmatch(text)
    if found is None:
        raise ModelError(f"input {text!r}", allowed="[NAME=]1x3x224x224[:DTYPE], DTYPE float32 unless given")
    sizes = tuple(int(size) for size in found["shape"].split("x"))
    if not all(sizes):
        raise ModelError(f"input {text!r} has an axis of 0, so that there is nothing to count", allowed="1 and up")
    dtype = found["dtype"] or ""
    if dtype and dtype not in _DTYPES:
        raise ModelError(f"input {text!r}: there is no dtype {dtype!r}", allowed=choices(dtype, _DTYPES))
    return Given(found["name"] or "", sizes, dtype)


def source(
    reference: str,
    *,
    inputs: Sequence[str] = (),
    tokens: int | None = None,
    batch: int | None = None,
    context: int | None = None,
) -> Source | GraphSource:
    """Return the model that a reference names, with the inputs asked for.

    Args:
        reference: ``timm:``, ``torchvision:``, ``py:``, ``bundled:``, ``hf:CONFIG_DIR`` (a folder with a ``config.json``
            of transformers; no weights are needed), a path that ends in ``.onnx``, or an artifact folder.
        inputs: Shapes, as :func:`parse_input` takes them; the model's own example with ``batch`` samples unless given.
        tokens: Tokens of a language model.
        batch: Samples, 1 unless given; where shapes are given, they say it.
        context: Tokens of a language model whose keys and values are cached: what is counted are the ``tokens`` after them, 1
            unless given.

    Raises:
        ModelError: The model cannot be found, an input says no shape, or a number is given that nothing would take.
        RuntimeMissingError: A package that the scheme needs is not installed.
    """
    given = tuple(parse_input(text) for text in inputs)
    if context is not None and (given or not reference.startswith("hf:")):
        raise ModelError(
            f"context = {context} for {reference}" + (f" beside {_shapes(given)}" if given else ""),
            allowed="a cache with language models of hf:CONFIG_DIR alone, without shapes of inputs",
        )
    language = reference.startswith("hf:")
    ref = None if language else ModelRef.parse(reference)
    if ref and ref.scheme in ("onnx", "artifact"):
        path = artifact_file(Path(ref.id)) if ref.scheme == "artifact" else Path(ref.id)
        return GraphSource(reference, path, given, batch or 1, tokens)
    for what, number in (("batch", batch), ("tokens", tokens)):
        if given and number is not None:
            raise ModelError(f"{what} = {number} beside {_shapes(given)}, which says it already", next_step=_ONE)
    if ref is None:
        usual = 128 if context is None else 1
        return _transformers(reference, given, tokens or usual, batch or 1, context)
    if tokens is not None:
        raise ModelError(
            f"tokens = {tokens} for {reference}, whose inputs have shapes of their own",
            allowed="tokens with hf:CONFIG_DIR and ONNX graphs with open axes",
            next_step="give the shapes: --input 1x128:int64",
        )
    torch = require_torch(reference)
    made: dict[str, Any] = {}

    def build() -> nn.Module:
        model = load_module(ref)
        if model is None:
            raise ModelError(f"{reference} is no PyTorch module", allowed=_FORMS)
        made["examples"] = model.examples
        return model.module

    def examples() -> tuple[Any, ...]:
        if given:
            return _positional(given)
        return tuple(torch.empty((batch or 1, *example.shape[1:]), dtype=example.dtype) for example in made["examples"])

    return Source(reference, build, examples, lambda: _named(given))


def _shapes(given: Sequence[Given]) -> str:
    return "input " + " ".join("x".join(map(str, entry.shape)) for entry in given)


def _positional(given: Sequence[Given]) -> tuple[Any, ...]:
    return tuple(_empty(entry) for entry in given if not entry.name)


def _named(given: Sequence[Given]) -> dict[str, Any]:
    return {entry.name: _empty(entry) for entry in given if entry.name}


def _empty(entry: Given) -> Any:
    torch = require_torch("an input")
    return torch.empty(entry.shape, dtype=vars(torch)[entry.dtype or "float32"])


def _transformers(
    reference: str, given: Sequence[Given], tokens: int, batch: int, context: int | None = None
) -> Source:
    torch = require_torch(reference)
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
    kind = _auto_class(library, config)
    if context is not None and (decodes(config) or kind is not library.AutoModelForCausalLM):
        raise ModelError(
            f"context = {context} for {reference}", allowed="a cache with language models that decode alone"
        )

    def examples() -> tuple[Any, ...]:
        return _positional(given) if given else (_main_input(reference, kind, config, tokens, batch),)

    def named() -> dict[str, Any]:
        if given:
            return _named(given)
        if decodes(config):
            return {"decoder_input_ids": torch.zeros(batch, tokens, dtype=torch.int64)}
        if kind is library.AutoModel and type(config) in library.AutoModelForZeroShotImageClassification._model_mapping:
            return {"pixel_values": _images(config.vision_config.to_dict(), batch)}  # of a pair of encoders, as CLIP is
        return {}

    return Source(reference, lambda: kind.from_config(config), examples, named, config, context)


def past(module: nn.Module, mode: FakeTensorMode, batch: int, tokens: int) -> Any:
    """Return the cache of keys and values that a model of transformers has after so many tokens, without numbers.

    Args:
        module: The model.
        mode: The mode that its tensors live in.
        batch: Sequences.
        tokens: Tokens of each.

    Raises:
        ModelError: It keeps no cache, or cannot read so many tokens.
    """
    torch = require_torch("a cache")
    from narrowcast.accounting.building import failed

    module.eval()
    try:
        with mode, torch.no_grad():
            out = module(torch.zeros(batch, tokens, dtype=torch.int64), use_cache=True)
    except Exception as error:  # a model may raise anything
        raise failed(error, "the model, while it reads the context") from error
    cache = out.get("past_key_values")  # an output of transformers lacks what the model does not give
    if cache is None:
        raise ModelError(
            f"{type(module).__name__} keeps no keys and values of past tokens",
            next_step="count it without a context: its state is of one size, however many tokens it has read",
        )
    return cache


def decodes(config: Any) -> bool:
    """Return whether a configuration of transformers is of an encoder and a decoder that attends to it."""
    return bool(config.is_encoder_decoder)


def _auto_class(library: Any, config: Any) -> Any:
    """Return what builds a configuration: whole encoder-decoders before what is their decoder alone."""
    whole = (library.AutoModelForSeq2SeqLM, library.AutoModelForSpeechSeq2Seq)
    wanted = whole if decodes(config) else (library.AutoModelForCausalLM,)
    for kind in (*wanted, library.AutoModel):
        if type(config) in kind._model_mapping:
            return kind
    raise ModelError(
        f"transformers builds no model from {type(config).__name__}", allowed="the configuration of a model"
    )


def _main_input(reference: str, kind: Any, config: Any, tokens: int, batch: int) -> Any:
    """Return what a model of transformers takes first: tokens, or a whole window of audio features.

    Raises:
        ModelError: It takes something whose shape its configuration does not say.
    """
    torch = require_torch(reference)
    built = kind._model_mapping[type(config)]
    name = (built[0] if isinstance(built, tuple) else built).main_input_name
    if name == "input_ids":
        return torch.zeros(batch, tokens, dtype=torch.int64)
    fields = config.to_dict()
    if name == "input_features" and {"num_mel_bins", "max_source_positions"} <= fields.keys():
        return torch.zeros(batch, fields["num_mel_bins"], 2 * fields["max_source_positions"])
    if name == "pixel_values" and {"num_channels", "image_size"} <= fields.keys():
        return _images(fields, batch)
    raise ModelError(
        f"{reference} takes {name}, whose shape its configuration does not say",
        next_step=f"give it: --input {name}=...",
    )


def _images(fields: Mapping[str, Any], batch: int) -> Any:
    side = fields["image_size"]
    sides = side if isinstance(side, list | tuple) else (side, side)
    return require_torch("images").zeros(batch, fields["num_channels"], *sides)

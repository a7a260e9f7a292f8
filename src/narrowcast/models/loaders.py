"""One loader per model scheme: from a reference to a prepared FP32 model."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx

from narrowcast.errors import ModelError, NarrowcastError, RuntimeMissingError, choices
from narrowcast.models import bundled
from narrowcast.models.bundled import TorchModel
from narrowcast.models.graph import Graph
from narrowcast.models.prepare import prepare, read_onnx
from narrowcast.models.reference import ImageSpec, Model, ModelRef
from narrowcast.models.runs import Architecture, architecture_of, load_weights, read_weights
from narrowcast.models.torch_export import export, require_torch

__all__ = ["artifact_file", "fresh_module", "load_model", "load_module", "user_code", "user_function"]


def load_model(reference: str | ModelRef, *, seed: int = 0) -> Model:
    """Return the prepared model that a reference names.

    Args:
        reference: ``timm:NAME``, ``torchvision:NAME``, ``onnx:FILE`` or a path that ends in ``.onnx``,
            ``py:MODULE:FUNCTION``, ``bundled:NAME``, an artifact folder, or the folder of a training run.
        seed: Seed of the random weights, for the schemes that have no trained ones.

    Raises:
        ModelError: The model cannot be found, read or exported.
        RuntimeMissingError: A package that the scheme needs is not installed.
    """
    ref = reference if isinstance(reference, ModelRef) else ModelRef.parse(reference)
    return _LOADERS[ref.scheme](ref, seed)


def load_module(ref: ModelRef, *, seed: int = 0) -> TorchModel | None:
    """Return the PyTorch module that a reference names, without exporting it; None for a scheme that has none.

    Args:
        ref: Any model reference.
        seed: Seed of the random weights, for the schemes that have no trained ones.

    Raises:
        ModelError: The model cannot be found.
        RuntimeMissingError: A package that the scheme needs is not installed.
    """
    make = _MODULES.get(ref.scheme)
    return None if make is None else make(ref, seed)


def fresh_module(architecture: Architecture, *, seed: int = 0) -> TorchModel:
    """Return a network to be trained.

    Args:
        architecture: ``timm:``, ``torchvision:`` and ``py:`` networks, and those of :data:`narrowcast.models.bundled.NETWORKS`,
            with fresh weights; other bundled ones with their trained weights.
        seed: Seed of the fresh weights.

    Raises:
        ModelError: The network cannot be found, built from these arguments, or trained.
        RuntimeMissingError: A package that the scheme needs is not installed.
    """
    ref = ModelRef.parse(architecture.name)
    if ref.scheme not in _FRESH:
        raise ModelError(
            f"network {architecture.name} cannot be trained",
            allowed=", ".join(f"{scheme}:" for scheme in _FRESH) + " or the folder of a training run",
            next_step="give the PyTorch network that it was exported from",
        )
    if architecture.input is not None and ref.scheme not in ("timm", "torchvision"):
        raise ModelError(
            f"network {architecture.name} says itself what it takes, and input is {list(architecture.input)}",
            next_step="leave network.input out",
        )
    try:
        return _FRESH[ref.scheme](ref, seed, architecture)
    except (TypeError, ValueError) as error:
        if not architecture.arguments and architecture.input is None:
            raise
        raise ModelError(
            f"network {architecture.name} cannot be built with {dict(architecture.arguments)}: {error}",
            next_step="check network.arguments",
        ) from error


def user_function(text: str, kind: str, error: type[NarrowcastError] = ModelError) -> Callable[..., Any]:
    """Return the function that ``module:function`` names, with the current folder on the import path.

    This runs the user's code; it is reached only by a reference that the user wrote as ``py:...``.

    Raises:
        error: The module or the function does not exist, or the module fails while it is imported.
    """
    module_name, colon, name = text.partition(":")
    if not colon or not module_name or not name:
        raise error(f"{kind} py:{text} names no function", allowed="py:MODULE:FUNCTION", next_step="add the function")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        with user_code(f"{kind} py:{text}", error, passed=(ImportError,)):
            module = importlib.import_module(module_name)
    except ImportError as cause:
        raise error(
            f"{kind} py:{text}: module {module_name!r} cannot be imported: {cause}",
            allowed="a module on the import path or in the current folder",
            next_step="run from the folder that holds the module, or install it",
        ) from cause
    function = vars(module).get(name)
    if not callable(function):
        raise error(
            f"{kind} py:{text}: module {module_name!r} has no function {name!r}",
            allowed=choices(name, [key for key, value in vars(module).items() if callable(value)][:40]),
        )
    return function


@contextmanager
def user_code(name: str, error: type[NarrowcastError], *, passed: tuple[type[Exception], ...] = ()) -> Generator[None]:
    """Run code of the user's; what goes wrong in it is the user's error, and not one of narrowcast.

    Args:
        name: How messages name the code, for example ``data py:mine:photos``.
        error: Type of the error.
        passed: Exceptions that the caller handles itself.

    Raises:
        error: The code raised something that narrowcast does not raise on purpose.
    """
    try:
        yield
    except (NarrowcastError, *passed):
        raise
    except Exception as cause:
        raise error(
            f"{name} failed with {type(cause).__name__}: {cause}",
            next_step="mend the code; --debug shows the line that failed",
        ) from cause


def _finish(ref: ModelRef, model: onnx.ModelProto, **known: Any) -> Model:
    graph = prepare(model, str(ref))
    _check_batch(graph, str(ref))
    exported = model.SerializeToString()
    return Model(ref, graph, exported, hashlib.sha256(exported).hexdigest(), **known)


def _check_batch(graph: Graph, source: str) -> None:
    fixed = [info for info in graph.inputs if info.shape and not info.dynamic_batch]
    if fixed:
        raise ModelError(
            f"{source}: input {fixed[0].name!r} has the fixed shape {list(fixed[0].shape)}",
            allowed="a dynamic first axis (the batch)",
            next_step="export it again with dynamic_shapes (torch.onnx.export) so that the first axis has a name",
        )


def _load_onnx(ref: ModelRef, seed: int) -> Model:
    del seed
    return _finish(ref, read_onnx(Path(ref.id)))


def _load_artifact(ref: ModelRef, seed: int) -> Model:
    del seed
    return _finish(ref, read_onnx(artifact_file(Path(ref.id))))


def artifact_file(folder: Path) -> Path:
    """Return the model file of an artifact folder.

    Raises:
        ModelError: There is none.
    """
    path = folder / "model.onnx"
    if not path.is_file():
        raise ModelError(
            f"folder {folder} holds no model.onnx", allowed="an artifact folder", next_step="check the path"
        )
    return path


def _package(name: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise RuntimeMissingError(
            f"package {name!r} is not installed", next_step=f"install it with: pip install 'narrowcast[{extra}]'"
        ) from error


def _timm(ref: ModelRef, seed: int, architecture: Architecture | None = None) -> TorchModel:
    torch = require_torch(str(ref))
    timm = _package("timm", "examples")
    if ref.id not in timm.list_models():
        raise ModelError(
            f"timm {timm.__version__} has no model {ref.id!r}", allowed=_nearest(ref.id, timm.list_models())
        )
    torch.manual_seed(seed)
    module = timm.create_model(ref.id, pretrained=False, **(architecture.arguments if architecture else {}))
    config = timm.data.resolve_model_data_config(module)
    sample = architecture.input if architecture else None
    channels, height, width = sample or config["input_size"]
    image = ImageSpec((height, width), tuple(config["mean"]), tuple(config["std"]), config["crop_pct"])
    if channels != len(image.mean):
        image = _plain(channels, height, width)
    example = (torch.randn(2, channels, height, width),)
    return TorchModel(module, example, ["image"], image=image, random_weights=True)


def _plain(channels: int, height: int, width: int) -> ImageSpec:
    """Return the preprocessing of images that are not photographs in colour: values from 0 to 1, whole."""
    return ImageSpec((height, width), (0.0,) * channels, (1.0,) * channels, crop=1.0)


def _torchvision(ref: ModelRef, seed: int, architecture: Architecture | None = None) -> TorchModel:
    torch = require_torch(str(ref))
    models = _package("torchvision.models", "examples")
    names = models.list_models(module=models)
    if ref.id not in names:
        raise ModelError(f"torchvision has no classification model {ref.id!r}", allowed=_nearest(ref.id, names))
    torch.manual_seed(seed)
    side = 299 if ref.id == "inception_v3" else 224
    kwargs: dict[str, Any] = {"init_weights": True} if ref.id in ("inception_v3", "googlenet") else {}
    kwargs |= architecture.arguments if architecture else {}
    module = models.get_model(ref.id, weights=None, **kwargs)
    channels, height, width = (architecture.input if architecture else None) or (3, side, side)
    image = ImageSpec((height, width)) if channels == 3 else _plain(channels, height, width)
    example = (torch.randn(2, channels, height, width),)
    return TorchModel(module, example, ["image"], image=image, random_weights=True)


def _nearest(given: str, names: list[str]) -> str:
    """Return at most five names that are near the given one."""
    near = difflib.get_close_matches(given, names, n=5, cutoff=0.4)
    return f"{len(names)} names, the nearest: {', '.join(near)}" if near else f"{len(names)} names"


def _python(ref: ModelRef, seed: int, architecture: Architecture | None = None) -> TorchModel:
    torch = require_torch(str(ref))
    torch.manual_seed(seed)
    function, arguments = user_function(ref.id, "model"), architecture.arguments if architecture else {}
    with user_code(f"model {ref}", ModelError, passed=(TypeError, ValueError) if arguments else ()):
        made = function(**arguments)
    hint = (
        "a function that returns (module, example) where example is a tensor, a tuple of them or a dict by input name"
    )
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], torch.nn.Module)):
        raise ModelError(f"model {ref} returned {type(made).__name__}", allowed=hint)
    module, example = made
    if isinstance(example, dict):
        example = _in_order(ref, module, {str(key): value for key, value in example.items()})
        names, values = list(example), tuple(example.values())
    else:
        values = example if isinstance(example, tuple) else (example,)
        names = ["input"] if len(values) == 1 else [f"input_{i}" for i in range(len(values))]
    for name, value in zip(names, values, strict=True):
        if not isinstance(value, torch.Tensor) or value.ndim == 0:
            raise ModelError(f"model {ref}: example input {name!r} is {type(value).__name__}", allowed=hint)
    return TorchModel(module, values, names)


def _in_order(ref: ModelRef, module: Any, example: dict[str, Any]) -> dict[str, Any]:
    """Return inputs that are named like the arguments of ``forward`` in their order; others as they are.

    Raises:
        ModelError: An argument between them is left out.
    """
    arguments = list(inspect.signature(module.forward).parameters)
    if not set(example) <= set(arguments):
        return example
    ordered = [name for name in arguments if name in example]
    if ordered != arguments[: len(ordered)]:
        missing = next(name for name in arguments if name not in example)
        raise ModelError(
            f"model {ref}: the example names {', '.join(ordered)}, and leaves out {missing!r}, which comes before",
            allowed="the first arguments of forward",
            next_step=f"add an example for {missing!r}, or wrap the module",
        )
    return {name: example[name] for name in ordered}


def _bundled(ref: ModelRef, seed: int) -> TorchModel:
    if ref.id not in bundled.MODELS:
        raise ModelError(f"no bundled model {ref.id!r}", allowed=choices(ref.id, bundled.MODELS))
    require_torch(str(ref)).manual_seed(seed)
    return bundled.MODELS[ref.id]()


def _fresh_bundled(ref: ModelRef, seed: int, architecture: Architecture) -> TorchModel:
    if ref.id not in bundled.NETWORKS:
        if architecture.arguments:
            raise ModelError(f"network {ref} takes no arguments", allowed=choices(ref.id, bundled.NETWORKS))
        return _bundled(ref, seed)
    require_torch(str(ref)).manual_seed(seed)
    return bundled.NETWORKS[ref.id](**architecture.arguments)


def _run(ref: ModelRef, seed: int) -> TorchModel:
    folder = Path(ref.id)
    architecture, sha256 = architecture_of(folder)
    made = fresh_module(architecture, seed=seed)
    load_weights(made.module, read_weights(folder, sha256), str(folder))
    return replace(made, random_weights=False)


def _load_torch(ref: ModelRef, seed: int) -> Model:
    made = _MODULES[ref.scheme](ref, seed)
    for name, value in zip(made.names, made.examples, strict=True):
        if value.shape[0] < 2:
            raise ModelError(
                f"model {ref}: example input {name!r} has batch {value.shape[0]}",
                allowed="a batch of at least 2, because PyTorch's exporter fixes a batch of 1",
                next_step="repeat the example along its first axis",
            )
    model = export(made.module, made.examples, made.names, str(ref))
    return _finish(ref, model, random_weights=made.random_weights, image=made.image, tokenize=made.tokenize)


_MODULES: dict[str, Callable[[ModelRef, int], TorchModel]] = {
    "timm": _timm,
    "torchvision": _torchvision,
    "py": _python,
    "bundled": _bundled,
    "run": _run,
}
_FRESH: Mapping[str, Callable[[ModelRef, int, Architecture], TorchModel]] = {
    "timm": _timm,
    "torchvision": _torchvision,
    "py": _python,
    "bundled": _fresh_bundled,
}
_LOADERS: dict[str, Callable[[ModelRef, int], Model]] = {
    "onnx": _load_onnx,
    "artifact": _load_artifact,
    **dict.fromkeys(_MODULES, _load_torch),
}

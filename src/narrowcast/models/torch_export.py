"""PyTorch modules to ONNX, with a dynamic batch axis and a numerical check of the export."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Generator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime as ort

from narrowcast.errors import ModelError, RuntimeMissingError

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["export", "require_torch"]

#: Outputs of the export may differ from PyTorch's by this share of their largest value (both compute in FP32).
PARITY = 1e-3


def require_torch(why: str) -> ModuleType:
    """Import and return torch.

    Raises:
        RuntimeMissingError: PyTorch is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise RuntimeMissingError(
            f"{why} needs PyTorch, which is not installed",
            allowed="torch 2.11 or newer",
            next_step="install it with: pip install 'narrowcast[torch]'",
        ) from error
    return torch


def export(module: nn.Module, examples: tuple[torch.Tensor, ...], names: list[str], source: str) -> onnx.ModelProto:
    """Return a module as ONNX with the first axis of every input dynamic.

    Args:
        module: A module; it is put into evaluation mode.
        examples: Example inputs with a batch of at least 2 (PyTorch's exporter specialises a batch of 1).
        names: A name for each input.
        source: How messages name the model.

    Raises:
        ModelError: PyTorch cannot export the module, or the exported graph computes something else.
    """
    torch = require_torch(source)
    module = module.eval()
    dim: Any = torch.export.Dim.DYNAMIC
    shapes = tuple({0: dim} for _ in examples)
    try:
        with torch.inference_mode(False), torch.no_grad(), _quiet(), tempfile.TemporaryDirectory() as folder:
            program = torch.onnx.export(
                module, examples, dynamo=True, dynamic_shapes=shapes, input_names=names, verbose=False
            )
            if program is None:
                raise RuntimeError("the exporter returned nothing")
            program.save(str(Path(folder) / "model.onnx"))
            model = onnx.load(Path(folder) / "model.onnx")
            expected = module(*examples)
    except Exception as error:  # the exporter raises whatever its stages raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{source} cannot be exported to ONNX by PyTorch {torch.__version__}: {reason}",
            allowed="modules that torch.onnx.export(dynamo=True) accepts with a dynamic batch axis",
            next_step="try torch.onnx.export on the module alone; control flow on tensor values is the usual cause",
        ) from error
    _strip(model)
    _check_parity(model, examples, names, expected, source)
    return model


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Silence the exporter's progress lines and warnings; failures still come as exceptions."""
    logger = logging.getLogger("torch")
    level = logger.level
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)


def _strip(model: onnx.ModelProto) -> None:
    """Drop the exporter's notes: stack traces with the paths of the machine that exported."""
    del model.metadata_props[:]
    for part in (*model.graph.node, *model.graph.input, *model.graph.output, *model.graph.value_info):
        del part.metadata_props[:]
    for node in model.graph.node:
        node.doc_string = ""
    for tensor in model.graph.initializer:
        del tensor.metadata_props[:]


def _check_parity(
    model: onnx.ModelProto, examples: tuple[torch.Tensor, ...], names: list[str], expected: object, source: str
) -> None:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    known = {value.name for value in session.get_inputs()}
    feeds = {name: example.numpy() for name, example in zip(names, examples, strict=True) if name in known}
    actual: list[Any] = list(session.run(None, feeds))
    flatten: Callable[[object], list[Any]] = require_torch(source).utils._pytree.tree_leaves
    for name, ours, theirs in zip([o.name for o in session.get_outputs()], actual, flatten(expected), strict=False):
        reference = theirs.detach().numpy()
        worst = float(np.abs(np.asarray(ours, np.float64) - reference).max())
        if not worst <= PARITY * max(1.0, float(np.abs(reference).max())):
            raise ModelError(
                f"the ONNX export of {source} is wrong: output {name!r} differs from PyTorch's by {worst:.3g}",
                allowed=f"differences up to {PARITY:g} of the largest output",
                next_step="look for dropout or random operators that stay active in evaluation mode",
            )

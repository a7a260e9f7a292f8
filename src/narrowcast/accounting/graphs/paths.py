"""Where in a model a node of its ONNX graph belongs, from what exporters write down."""

from __future__ import annotations

import ast
from typing import NamedTuple

import onnx

__all__ = ["Scope", "scope_of"]


class Scope(NamedTuple):
    """A module's place in a model.

    Args:
        path: Its name in the model, such as ``layer1.0.conv1``; empty if nobody wrote one down.
        classes: Class names of the modules around it by their paths, itself included, as far as they are known.
    """

    path: str
    classes: dict[str, str]


_UNKNOWN = Scope("", {})


def scope_of(node: onnx.NodeProto) -> Scope:
    """Return the module that a node was exported from.

    PyTorch's exporter writes the names and classes of the modules around a node into its properties; the older one, and
    most others, write ``/layer1/layer1.0/conv1/Conv`` as its name; else the name of its weights tells. A convolution that
    the exporter fused a batch normalisation into belongs to the convolution's module.
    """
    properties = {entry.key: entry.value for entry in node.metadata_props}
    weights = _of_weights(node)
    if "FuseBatchNorm" in properties.get("pkg.onnxscript.rewriter.rule_name", "") and weights:
        return Scope(weights, _named(properties).classes)
    if "pkg.torch.onnx.name_scopes" in properties:
        return _named(properties)
    if "/" in node.name.strip("/"):
        return Scope(_joined(node.name), {})
    return Scope(weights, {}) if weights else _UNKNOWN


def _named(properties: dict[str, str]) -> Scope:
    """Return the scope of PyTorch's exporter: lists of names and of classes, the operator itself last."""
    names = _words(properties.get("pkg.torch.onnx.name_scopes", ""))[:-1]
    classes = _words(properties.get("pkg.torch.onnx.class_hierarchy", ""))[:-1]
    if not names:
        return _UNKNOWN
    known = zip(names, classes, strict=True) if len(names) == len(classes) else ()
    return Scope(names[-1], {path: kind.rpartition(".")[2] for path, kind in known})


def _words(text: str) -> list[str]:
    """Return a list of words that is written as Python writes one; empty if it is anything else."""
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return []
    return [word for word in found if isinstance(word, str)] if isinstance(found, list) else []


def _joined(name: str) -> str:
    """Return ``layer1.0.conv1`` for ``/layer1/layer1.0/conv1/Conv``: a part that repeats the one before goes on from it."""
    parts: list[str] = []
    for part in name.strip("/").split("/")[:-1]:
        if parts and part.startswith(parts[-1] + "."):
            parts[-1] = part
        else:
            parts.append(part)
    return ".".join(parts)


def _of_weights(node: onnx.NodeProto) -> str:
    """Return ``layer1.0.conv1`` of a node that reads ``layer1.0.conv1.weight``."""
    ends = (".weight", ".bias")
    return next((name.rpartition(".")[0] for name in node.input if name.endswith(ends)), "")

"""Where a model comes from, as text that a person types and a manifest keeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from narrowcast.errors import ModelError, choices
from narrowcast.models.graph import Graph

__all__ = ["RUN_RECORD", "ImageSpec", "Model", "ModelRef"]

SCHEMES = ("timm", "torchvision", "onnx", "py", "bundled", "artifact", "run")

#: What the folder of a finished training run holds, beside its weights.
RUN_RECORD = "result.json"


@dataclass(frozen=True)
class ModelRef:
    """A model's scheme and identifier.

    Attributes:
        scheme: One of ``timm``, ``torchvision``, ``onnx``, ``py``, ``bundled``, ``artifact``, ``run``.
        id: What the scheme's loader looks up: an architecture name, a path, or ``module:function``.
    """

    scheme: str
    id: str

    @classmethod
    def parse(cls, text: str) -> ModelRef:
        """Return the reference that a text names.

        Raises:
            ModelError: The text has no known scheme and is neither an ``.onnx`` path nor a folder.

        >>> ModelRef.parse("timm:resnet18")
        ModelRef(scheme='timm', id='resnet18')
        >>> ModelRef.parse("nets/a.onnx")
        ModelRef(scheme='onnx', id='nets/a.onnx')
        """
        scheme, colon, rest = text.partition(":")
        if colon and rest and scheme in SCHEMES:
            return cls(scheme, rest)
        if text.endswith(".onnx"):
            return cls("onnx", text)
        if text and Path(text).is_dir():
            return cls("run" if (Path(text) / RUN_RECORD).is_file() else "artifact", text)
        hint = choices(scheme, SCHEMES) if colon else "timm:NAME, torchvision:NAME, py:MODULE:FUNCTION, bundled:NAME"
        raise ModelError(
            f"model {text!r} names no known source",
            allowed=f"{hint}, a path that ends in .onnx, an artifact folder, or the folder of a training run",
            next_step="write for example bundled:efficientnet-lite0 or path/to/model.onnx",
        )

    def __str__(self) -> str:
        return f"{self.scheme}:{self.id}"


@dataclass(frozen=True)
class ImageSpec:
    """How a picture becomes the input of an image model.

    Attributes:
        size: Height and width in pixels.
        mean: Per-channel mean, on the 0 to 1 scale, that is subtracted.
        std: Per-channel standard deviation, on the 0 to 1 scale, that is divided by.
        crop: Share of the shorter side that the centre crop keeps.
    """

    size: tuple[int, int]
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    crop: float = 0.875


@dataclass(frozen=True)
class Model:
    """A resolved model: its FP32 graph and what is known about it.

    Attributes:
        ref: Where it came from.
        graph: The graph, folded and with inferred shapes (see ``models.prepare``).
        exported: The ONNX bytes as they were exported or read, before anything was folded: what comparisons run against.
        sha256: Hash of those bytes.
        random_weights: True where nobody trained the weights; every report says so.
        image: Preprocessing, for image models that declare it.
        tokenize: Sentences to input arrays, for text models that ship their tokenizer.
    """

    ref: ModelRef
    graph: Graph
    exported: bytes = field(repr=False)
    sha256: str
    random_weights: bool = False
    image: ImageSpec | None = None
    tokenize: Callable[[list[str]], dict[str, object]] | None = field(default=None, compare=False)

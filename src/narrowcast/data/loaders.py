"""One loader per data scheme: from a reference and a model to samples that the model takes."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from narrowcast.data import bundled
from narrowcast.data.dataset import Dataset, Tensors, check_finite, check_fits, digest_of
from narrowcast.data.images import load_image, to_input
from narrowcast.data.rows import Rows, open_rows
from narrowcast.errors import DataError, choices
from narrowcast.models.loaders import user_code, user_function
from narrowcast.models.reference import ImageSpec, Model

__all__ = ["load_data"]

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"}
T = TypeVar("T")

LABEL_NAMES = ("labels", "label", "y")


def load_data(reference: str, model: Model) -> Dataset:
    """Return the samples that a reference names, in the form that a model takes, checked against its inputs.

    Args:
        reference: ``bundled:NAME``, ``npz:FILE`` (or a path that ends in ``.npz``), ``imagefolder:DIR`` or
            ``py:MODULE:FUNCTION``.
        model: The model that will read the samples; image folders are preprocessed as it asks.

    Raises:
        DataError: The data cannot be read or do not fit the model.
    """
    scheme, colon, rest = reference.partition(":")
    if not colon and reference.endswith(".npz"):
        scheme, rest = "npz", reference
    if scheme not in _LOADERS or not rest:
        raise DataError(
            f"data {reference!r} name no known source",
            allowed=choices(scheme, _LOADERS) + ", each followed by a colon and a name",
            next_step="write for example bundled:photos or npz:data.npz",
        )
    data = _LOADERS[scheme](rest, model)
    if data.size == 0:
        raise DataError(f"{reference} holds no samples", allowed="at least 3", next_step="give more data")
    check_fits(data, model.graph.inputs)
    return data


def _bundled(name: str, model: Model) -> Dataset:
    if name not in bundled.DATASETS:
        raise DataError(f"no bundled data {name!r}", allowed=choices(name, bundled.DATASETS))
    return bundled.DATASETS[name](model)


def _npz(name: str, model: Model) -> Dataset:
    arrays = _read(Path(name), open_rows)
    labels = next((arrays.pop(key) for key in LABEL_NAMES if key in arrays and key not in _input_names(model)), None)
    groups = arrays.pop("groups", None) if "groups" not in _input_names(model) else None
    return from_arrays(f"npz:{name}", arrays, _whole(labels), _whole(groups))


def _whole(array: NDArray[Any] | Rows | None) -> NDArray[Any] | None:
    return array[:] if isinstance(array, Rows) else array


def _input_names(model: Model) -> set[str]:
    return {info.name for info in model.graph.inputs}


def read_npz(path: Path) -> Tensors:
    """Return the arrays of an .npz file; pickled objects are refused.

    Raises:
        DataError: The file is missing, damaged, or holds Python objects.
    """
    return _read(path, _in_memory)


def _in_memory(path: Path) -> Tensors:
    with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
        return {key: archive[key] for key in archive.files}


def _read(path: Path, read: Callable[[Path], T]) -> T:
    if not path.is_file():
        raise DataError(
            f"data file {path} does not exist",
            allowed="an .npz file",
            next_step="check the path",
        )
    try:
        return read(path)
    except (ValueError, TypeError, OSError, zipfile.BadZipFile, zlib.error, EOFError, AttributeError) as error:
        raise DataError(
            f"{path} cannot be read as an .npz archive: {error}",
            allowed="numeric arrays saved with numpy.savez",
            next_step="save the data again with numpy.savez(path, input_name=array, labels=array)",
        ) from error


def from_arrays(
    source: str, arrays: Mapping[str, NDArray[Any] | Rows], labels: Any = None, groups: Any = None
) -> Dataset:
    """Return a dataset over arrays, checked for equal lengths and finite values.

    Raises:
        DataError: Lengths differ, a value is not finite, or labels are not class indices.
    """
    lengths = {name: (len(array) if array.ndim else 0) for name, array in arrays.items()}
    if labels is not None:
        labels = check_labels(source, np.asarray(labels))
        lengths["labels"] = len(labels)
    if groups is not None:
        groups = np.unique(np.asarray(groups), return_inverse=True)[1].reshape(-1).astype(np.int64)
        lengths["groups"] = len(groups)
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name}: {length}" for name, length in lengths.items())
        raise DataError(
            f"{source}: the arrays have different numbers of samples ({listed})",
            allowed="equal lengths",
            next_step="give every array one row per sample, labels too",
        )
    for name, array in arrays.items():
        check_finite(source, name, array)
    digest = digest_of(
        *(part for name in sorted(arrays) for part in (name, arrays[name])),
        *(p for p in (labels, groups) if p is not None),
    )
    size = next(iter(lengths.values()), 0)
    return Dataset(source, digest, size, lambda i: {n: a[i] for n, a in arrays.items()}, labels, groups)


def check_labels(source: str, labels: NDArray[Any]) -> NDArray[np.int64]:
    """Return labels as int64 class indices.

    Raises:
        DataError: They are not whole numbers in one dimension, or one is negative.
    """
    labels = labels.reshape(-1) if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if labels.ndim != 1 or labels.dtype.kind not in "iub":
        raise DataError(
            f"{source}: labels have shape {list(labels.shape)} and type {labels.dtype}",
            allowed="one whole number per sample: the index of its class",
            next_step="convert one-hot labels with .argmax(1)",
        )
    if len(labels) and labels.min() < 0:
        raise DataError(
            f"{source}: label {int(labels.min())} (sample {int(labels.argmin())}) is negative",
            allowed="0 and up",
            next_step="number the classes from 0, and leave out samples without a class",
        )
    return labels.astype(np.int64)


def _imagefolder(name: str, model: Model) -> Dataset:
    folder = Path(name)
    if not folder.is_dir():
        raise DataError(f"image folder {name} does not exist", next_step="check the path; it must be a folder")
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    if not files:
        raise DataError(
            f"image folder {name} holds no pictures", allowed=f"files that end in {', '.join(sorted(IMAGE_SUFFIXES))}"
        )
    spec, channels, input_name = image_input(model, f"imagefolder:{name}")
    parents = sorted({p.relative_to(folder).parts[0] for p in files if len(p.relative_to(folder).parts) > 1})
    labelled = bool(parents) and all(len(p.relative_to(folder).parts) > 1 for p in files)
    labels = np.array([parents.index(p.relative_to(folder).parts[0]) for p in files], np.int64) if labelled else None

    def load(indices: NDArray[np.int64]) -> Tensors:
        pictures = [to_input(load_image(files[i], channels), spec) for i in indices]
        return {input_name: np.stack(pictures)}

    listing = "\n".join(f"{p.relative_to(folder)}:{p.stat().st_size}:{digest_of(p.read_bytes())}" for p in files)
    return Dataset(f"imagefolder:{name}", digest_of(listing, repr(spec)), len(files), load, labels)


def image_input(model: Model, source: str) -> tuple[ImageSpec, int, str]:
    """Return the preprocessing, channels and name of a model's only image input.

    Raises:
        DataError: The model does not take one FP32 image ``[N, C, H, W]``.
    """
    inputs = model.graph.inputs
    shape = inputs[0].shape
    if len(inputs) != 1 or len(shape) != 4 or shape[1] not in (1, 3) or inputs[0].dtype != np.float32:
        described = "; ".join(f"{info.name}: {info.dtype} {list(info.shape)}" for info in inputs)
        raise DataError(
            f"{source} gives pictures, but {model.ref} takes {described}",
            allowed="one FP32 input [batch, 1 or 3, height, width]",
            next_step="give the arrays themselves as npz:FILE or py:MODULE:FUNCTION",
        )
    channels = int(shape[1])
    if model.image is not None:
        return model.image, channels, inputs[0].name
    height, width = (dim if isinstance(dim, int) else 224 for dim in shape[2:])
    return (
        (ImageSpec((height, width)) if channels == 3 else ImageSpec((height, width), (0.0,), (1.0,))),
        channels,
        inputs[0].name,
    )


def _python(name: str, model: Model) -> Dataset:
    function = user_function(name, "data", DataError)
    with user_code(f"data py:{name}", DataError):
        made = function()
    hint = "a Dataset, a dict of arrays by input name (key 'labels' optional), or a tuple (inputs, labels)"
    if isinstance(made, Dataset):
        return _checked(made, f"data py:{name}")
    labels = None
    if isinstance(made, tuple) and len(made) == 2:
        made, labels = made
    if isinstance(made, np.ndarray) and len(model.graph.inputs) == 1:
        made = {model.graph.inputs[0].name: made}
    if not isinstance(made, dict) or not all(isinstance(value, np.ndarray) for value in made.values()):
        raise DataError(f"data py:{name} returned {type(made).__name__}", allowed=hint)
    arrays = dict(made)
    if labels is None:
        labels = next(
            (arrays.pop(key) for key in LABEL_NAMES if key in arrays and key not in _input_names(model)), None
        )
    return from_arrays(f"py:{name}", arrays, labels, arrays.pop("groups", None))


def _checked(data: Dataset, name: str) -> Dataset:
    """Return a dataset of the user's whose samples are checked whenever they are loaded: nobody sees all of them before."""

    def load(indices: NDArray[np.int64]) -> Tensors:
        with user_code(name, DataError):
            arrays = data.load(indices)
        for key, array in arrays.items():
            check_finite(f"{name}, samples {int(indices[0])} to {int(indices[-1])}", key, array)
        return arrays

    return replace(data, load=load)


_LOADERS: dict[str, Callable[[str, Model], Dataset]] = {
    "bundled": _bundled,
    "npz": _npz,
    "imagefolder": _imagefolder,
    "py": _python,
}

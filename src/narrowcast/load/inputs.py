"""What requests carry: made from a model's metadata, or taken from a file or an artifact."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from narrowcast.artifacts.store import load_artifact
from narrowcast.errors import DataError, choices
from narrowcast.load.introduction import Introduction, TensorSpec
from narrowcast.oip.datatypes import DATATYPES, Datatype

__all__ = ["Batches", "Tensors", "make_tensors", "read_batches", "read_shapes"]

Tensors = dict[str, NDArray[Any]]

#: Different requests of each batch size, so that no cache on the way is flattered.
_VARIANTS = 8
#: Bytes that they may take together, over which there are fewer.
_MOST_BYTES = 64 << 20
#: Random integers are below this, so that they are valid as token numbers; 8-bit types use all of their range.
_TOKENS = 100
_LETTERS = "abcdefghijklmnopqrstuvwxyz"

#: Rows of a request, and the share of requests that have so many.
Batches = dict[int, float]


def read_batches(text: str) -> Batches:
    """Return the batch sizes of requests and their shares.

    >>> read_batches("1:3,8:1")
    {1: 0.75, 8: 0.25}

    Raises:
        DataError: The text does not say any.
    """
    weights: Batches = {}
    for part in text.split(","):
        size, _, weight = part.partition(":")
        try:
            rows, share = int(size), float(weight or 1)
        except ValueError:
            rows, share = 0, 0.0
        if rows < 1 or not 0 < share < math.inf or rows in weights:
            raise DataError(
                f"batch {text!r} cannot be read at {part!r}", allowed="ROWS, or ROWS:WEIGHT,ROWS:WEIGHT,..."
            )
        weights[rows] = share
    total = sum(weights.values())
    return {rows: weight / total for rows, weight in weights.items()}


def read_shapes(texts: Sequence[str], inputs: Sequence[TensorSpec]) -> dict[str, tuple[int, ...]]:
    """Return the shapes that are given for inputs as ``[NAME=]1x3x224x224``.

    Raises:
        DataError: A text is no shape, or its name is none of the inputs'.
    """
    names = [spec.name for spec in inputs]
    shapes: dict[str, tuple[int, ...]] = {}
    for text in texts:
        name, equals, digits = text.rpartition("=")
        if not equals and len(names) != 1:
            raise DataError(
                f"input {text!r} does not say which one it means", allowed=f"NAME={text} for {', '.join(names)}"
            )
        name = name if equals else names[0]
        if name not in names:
            raise DataError(f"the model has no input {name!r}", allowed=choices(name, names))
        try:
            shape = tuple(int(size) for size in digits.split("x"))
        except ValueError:
            shape = ()
        if not shape or min(shape) < 1:
            raise DataError(f"input {text!r} has no shape that can be read", allowed="NAME=1x3x224x224")
        shapes[name] = shape
    return shapes


@dataclass(frozen=True)
class _Plan:
    """An input with the shape of one row, or the whole shape where the model has no batch axis."""

    spec: TensorSpec
    datatype: Datatype
    rest: tuple[int, ...]
    batched: bool

    def shape(self, rows: int) -> tuple[int, ...]:
        return (rows, *self.rest) if self.batched else self.rest


def make_tensors(
    known: Introduction, batches: Batches, data: str, shapes: Mapping[str, tuple[int, ...]], seed: int
) -> dict[int, list[Tensors]]:
    """Return the inputs of requests by their rows, for each number of rows several.

    Args:
        known: What the model takes.
        batches: Rows of requests.
        data: ``random``, ``zeros``, an .npz file with an array for each input, or the folder of an artifact, whose
            reference inputs are taken.
        shapes: Shapes of inputs, for axes that the model leaves open.
        seed: Of random values.

    Raises:
        DataError: The data do not fit the model, or something is left open.
    """
    plans = [_plan(spec, known, shapes.get(spec.name)) for spec in known.inputs]
    _check_batches(plans, known, batches)
    size = sum(math.prod(plan.rest) * max(1, plan.datatype.size) for plan in plans) * max(batches)
    variants = max(1, min(_VARIANTS, _MOST_BYTES // max(1, size * len(batches))))
    if data in ("random", "zeros"):
        rng = np.random.default_rng(seed) if data == "random" else None
        return {
            rows: [{plan.spec.name: _made(plan, rows, rng) for plan in plans} for _ in range(variants)]
            for rows in batches
        }
    arrays = _read_arrays(Path(data))
    stored = {plan.spec.name: _stored(plan, arrays, data) for plan in plans}
    return {rows: [_rows_of(plans, stored, rows, number) for number in range(variants)] for rows in batches}


def _plan(spec: TensorSpec, known: Introduction, given: tuple[int, ...] | None) -> _Plan:
    datatype = DATATYPES.get(spec.datatype)
    if datatype is None:
        raise DataError(f"input {spec.name!r} has the unknown type {spec.datatype!r}", allowed=", ".join(DATATYPES))
    batched = known.largest_batch != 0 and bool(spec.shape) and (spec.shape[0] == -1 or bool(known.largest_batch))
    shape = spec.shape if given is None else given
    fits = len(shape) == len(spec.shape) and all(
        mine in (theirs, -1) or theirs == -1 for mine, theirs in zip(shape, spec.shape, strict=True)
    )
    if not fits:
        raise DataError(f"input {spec.name!r} is {spec} and cannot have the shape {'x'.join(map(str, shape))}")
    rest = shape[1:] if batched else shape
    if min(rest, default=1) < 0:
        example = "x".join("1" if batched and not place else str(max(1, size)) for place, size in enumerate(shape))
        raise DataError(
            f"input {spec} leaves axes open", next_step=f"say how long they are: --input {spec.name}={example}"
        )
    return _Plan(spec, datatype, rest, batched)


def _check_batches(plans: Sequence[_Plan], known: Introduction, batches: Batches) -> None:
    if known.largest_batch and max(batches) > known.largest_batch:
        raise DataError(
            f"a batch of {max(batches)} rows is more than the model takes", allowed=f"up to {known.largest_batch} rows"
        )
    if set(batches) != {1} and not all(plan.batched for plan in plans):
        fixed = next(plan.spec for plan in plans if not plan.batched)
        raise DataError(f"input {fixed} has no batch axis", allowed="--batch 1, which means one tensor of that shape")


def _made(plan: _Plan, rows: int, rng: np.random.Generator | None) -> NDArray[Any]:
    """Return random values, or zeros without a generator."""
    shape, dtype = plan.shape(rows), plan.datatype.dtype
    if plan.datatype.size == 0:
        texts = np.empty(math.prod(shape), object)
        texts[:] = ["" if rng is None else "".join(rng.choice(list(_LETTERS), 8)) for _ in texts]
        return np.array([text.encode() for text in texts], object).reshape(shape)
    if rng is None:
        return np.zeros(shape, dtype)
    if dtype == np.bool_:
        return rng.integers(0, 2, shape).astype(np.bool_)
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        low, high = (limits.min, limits.max + 1) if dtype.itemsize == 1 else (0, _TOKENS)
        return rng.integers(low, high, shape).astype(dtype)
    return rng.standard_normal(shape, np.float32).astype(dtype)


def _read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Return the arrays of a file, or the reference inputs of an artifact."""
    if path.is_dir():
        load_artifact(path)
        arrays = _load(path / "reference.npz")
        return {name.removeprefix("in:"): array for name, array in arrays.items() if name.startswith("in:")}
    return _load(path)


def _load(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except FileNotFoundError as error:
        raise DataError(
            f"data {path} do not exist", allowed="random, zeros, an .npz file, or the folder of an artifact"
        ) from error
    except (OSError, ValueError, zipfile.BadZipFile, AttributeError, TypeError) as error:
        raise DataError(
            f"data {path} cannot be read as .npz", allowed="arrays by name, without Python objects"
        ) from error


def _stored(plan: _Plan, arrays: Mapping[str, NDArray[Any]], data: str) -> NDArray[Any]:
    """Return the array of an input, whose type and shape fit."""
    name = plan.spec.name
    if name not in arrays:
        raise DataError(f"{data} has no array for the input {name!r}", allowed=choices(name, arrays))
    array = arrays[name]
    if plan.datatype.size == 0 and array.dtype.kind in "SU":
        encoded = [text.encode() if isinstance(text, str) else bytes(text) for text in array.reshape(-1).tolist()]
        array = np.array(encoded, object).reshape(array.shape)
    if array.dtype != plan.datatype.dtype:
        raise DataError(
            f"array {name!r} of {data} is {array.dtype}, the model takes {plan.datatype.name}",
            next_step=f"convert it: array.astype({str(plan.datatype.dtype)!r})",
        )
    expected = array.shape[1:] if plan.batched else array.shape
    if expected != plan.rest or not array.size:
        wanted = "x".join(("n", *map(str, plan.rest)) if plan.batched else map(str, plan.rest))
        raise DataError(f"array {name!r} of {data} has the shape {'x'.join(map(str, array.shape))}, not {wanted}")
    return array


def _rows_of(plans: Sequence[_Plan], stored: Mapping[str, NDArray[Any]], rows: int, number: int) -> Tensors:
    """Return so many rows of each array, further on for each number, from the start again at the end."""
    return {
        plan.spec.name: np.take(array, np.arange(number * rows, (number + 1) * rows), axis=0, mode="wrap")
        if plan.batched
        else array
        for plan in plans
        for array in (stored[plan.spec.name],)
    }

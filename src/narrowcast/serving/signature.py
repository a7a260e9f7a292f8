"""What a model takes and gives, in the protocol's terms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from numpy.typing import NDArray

from narrowcast.serving.datatypes import Datatype
from narrowcast.serving.refusals import Refusal

__all__ = ["RequestedOutput", "SharedSlice", "Signature", "TensorSpec", "Tensors"]

Tensors = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class TensorSpec:
    """Name, element type and shape of an input or output; -1 stands for an axis of any length."""

    name: str
    datatype: Datatype
    shape: tuple[int, ...]

    @cached_property
    def admitted(self) -> set[tuple[int, ...]]:
        """Shapes that were seen to fit, for those who check often; who adds to them bounds them."""
        return set()

    def admits(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of this shape fits."""
        if len(shape) != len(self.shape):
            return False
        for size, given in zip(self.shape, shape, strict=True):  # noqa: SIM110  a generator takes twice as long
            if size not in (given, -1):
                return False
        return True


@dataclass(frozen=True)
class SharedSlice:
    """A part of a shared memory region: name of the region, first byte and number of bytes."""

    region: str
    offset: int
    size: int


@dataclass(frozen=True)
class RequestedOutput:
    """An output that a client asked for.

    Attributes:
        spec: The model's output.
        binary: Whether it is sent as bytes behind the JSON.
        shared: Where it is written instead, if the client asked for that.
    """

    spec: TensorSpec
    binary: bool
    shared: SharedSlice | None = None


@dataclass(frozen=True)
class Signature:
    """Inputs and outputs of a model.

    Attributes:
        inputs: What it takes.
        outputs: What it gives.
        batched: Whether the first axis of every input and output is the batch axis, of any length.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batched: bool

    @cached_property
    def input_by_name(self) -> dict[str, TensorSpec]:
        """The inputs by name."""
        return {spec.name: spec for spec in self.inputs}

    @cached_property
    def output_by_name(self) -> dict[str, TensorSpec]:
        """The outputs by name."""
        return {spec.name: spec for spec in self.outputs}

    @cached_property
    def all_as_json(self) -> tuple[RequestedOutput, ...]:
        """What a client gets that names no outputs."""
        return tuple(RequestedOutput(spec, binary=False) for spec in self.outputs)

    @cached_property
    def all_as_bytes(self) -> tuple[RequestedOutput, ...]:
        """What a client gets that names no outputs and asks for bytes."""
        return tuple(RequestedOutput(spec, binary=True) for spec in self.outputs)

    def check(self, tensors: Mapping[str, NDArray[Any]]) -> int:
        """Check the shapes of a request's inputs, whose names and types are known to fit.

        Returns:
            The number of rows: the length of the batch axis, or 1 where there is none.

        Raises:
            Refusal: An input is missing or of a wrong shape, or the inputs differ in their numbers of rows.
        """
        rows = 0
        for spec in self.inputs:
            tensor = tensors.get(spec.name)
            if tensor is None:
                raise Refusal(400, f"input {spec.name!r} is missing")
            shape = tensor.shape
            if not spec.admits(shape):
                raise Refusal(
                    400, f"input {spec.name!r} has shape {list(shape)}; allowed: {list(spec.shape)} (-1: any)"
                )
            if self.batched:
                if rows and shape[0] != rows:
                    raise Refusal(400, f"input {spec.name!r} has {shape[0]} rows, the inputs before it {rows}")
                rows = shape[0]
                if not rows:
                    raise Refusal(400, f"input {spec.name!r} has no rows")
        return rows or 1

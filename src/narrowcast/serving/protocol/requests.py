"""An inference request, read from JSON, from JSON with binary tensors behind it, or from one raw tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import orjson

from narrowcast.serving.datatypes import Datatype, decode_binary, decode_json
from narrowcast.serving.limits import Limits
from narrowcast.serving.refusals import Refusal
from narrowcast.serving.signature import Signature, Tensors, TensorSpec

__all__ = [
    "InferRequest",
    "RequestedOutput",
    "SharedRegions",
    "SharedSlice",
    "check_shape",
    "read_document",
    "read_infer",
]

Object = dict[str, Any]

#: More than any memory holds, and few enough that their bytes can be counted in 64 bits.
_MOST_ELEMENTS = 1 << 48
#: Priority 0 asks for the default, and 1 is served first (schedule policy extension).
_MAX_PRIORITY = 64
#: Parameters that belong to extensions which this server does not have; to ignore them would give wrong answers.
_UNSUPPORTED = ("sequence_id", "sequence_start", "sequence_end")


@dataclass(frozen=True)
class SharedSlice:
    """A part of a shared memory region: name of the region, first byte and number of bytes."""

    region: str
    offset: int
    size: int


class SharedRegions(Protocol):
    """Reads and writes parts of regions; both refuse what lies outside one."""

    def read(self, place: SharedSlice) -> bytes: ...

    def write(self, place: SharedSlice, data: bytes | memoryview) -> None: ...


@dataclass(slots=True)
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


@dataclass(slots=True)
class InferRequest:
    """One inference request.

    Attributes:
        id: What the client calls it; echoed.
        inputs: Tensors by name, of the names, types and shapes that the model takes.
        rows: Length of the batch axis.
        outputs: What to answer with.
        priority: 1 goes first; 0 is the default.
        timeout: Seconds that the client waits, or None.
    """

    id: str
    inputs: Tensors
    rows: int
    outputs: tuple[RequestedOutput, ...]
    priority: int = 0
    timeout: float | None = None


def read_infer(
    body: bytes, header_length: int | None, signature: Signature, limits: Limits, shared: SharedRegions
) -> InferRequest:
    """Return the request that a body holds.

    Args:
        body: JSON, or JSON and the data of its binary tensors, or the data of the model's only input.
        header_length: Length of the JSON where bytes follow it; 0 for a raw tensor; None where all is JSON.
        signature: What the model takes and gives.
        limits: Bounds on tensors.
        shared: Regions of shared memory that tensors may be in.

    Raises:
        Refusal: Anything does not fit.
    """
    if header_length == 0:
        return _read_raw(body, signature)
    if header_length is not None and not 0 < header_length <= len(body):
        raise Refusal(400, f"Inference-Header-Content-Length is {header_length}, but the body has {len(body)} bytes")
    if header_length is None:
        return read_document(_load(body), (), signature, limits, shared)
    view = memoryview(body)
    return read_document(_load(view[:header_length]), (view[header_length:],), signature, limits, shared)


def read_document(
    document: Object, data: Sequence[memoryview], signature: Signature, limits: Limits, shared: SharedRegions
) -> InferRequest:
    """Return the request that a document describes.

    Args:
        document: The request as JSON has it.
        data: Data of its binary tensors: one behind the other, or a part for each.
        signature: What the model takes and gives.
        limits: Bounds on tensors.
        shared: Regions of shared memory that tensors may be in.

    Raises:
        Refusal: Anything does not fit.
    """
    parameters = _object(document, "parameters", "the request")
    inputs = _read_inputs(document, _Tail(data), signature, limits, shared)
    outputs = _read_outputs(document, parameters, signature, limits)
    identity = document.get("id", "")
    if not isinstance(identity, str):
        raise Refusal(400, "'id' is no text")
    request = InferRequest(identity, inputs, signature.check(inputs), outputs)
    if parameters:
        _apply(parameters, request)
    return request


def _load(text: bytes | memoryview) -> Object:
    try:
        document = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise Refusal(400, f"the request is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise Refusal(400, "the request is no JSON object")
    return cast(Object, document)


def _object(parent: Object, key: str, owner: str) -> Object:
    """Return a member that is an object, empty where it is missing."""
    value = parent.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise Refusal(400, f"{key!r} of {owner} is no JSON object")
    return cast(Object, value)


def _objects(document: Object, key: str, limits: Limits) -> list[Object]:
    """Return a member that is an array of objects."""
    value = document.get(key)
    if not isinstance(value, list):
        raise Refusal(400, f"{key!r} is no array")
    items = cast(list[object], value)
    if len(items) > limits.tensors:
        raise Refusal(400, f"{key!r} has more than {limits.tensors} items")
    if set(map(type, items)) - {dict}:
        raise Refusal(400, f"an item of {key!r} is no JSON object")
    return cast(list[Object], items)


class _Tail:
    """The data of binary tensors, taken in order."""

    def __init__(self, parts: Sequence[memoryview]) -> None:
        self._parts = parts
        self._part = 0
        self._at = 0

    def take(self, name: str, size: object) -> memoryview:
        """Return the next bytes; a tensor never spans two parts."""
        if self._part < len(self._parts) - 1 and self._at == len(self._parts[self._part]):
            self._part, self._at = self._part + 1, 0
        left = len(self._parts[self._part]) - self._at if self._parts else 0
        if type(size) is not int or not 0 <= size <= left:
            raise Refusal(400, f"input {name!r}: 'binary_data_size' is {size!r}, but {left} bytes are left")
        self._at += size
        return self._parts[self._part][self._at - size : self._at] if self._parts else memoryview(b"")

    @property
    def left(self) -> int:
        """Bytes that nobody took."""
        return sum(map(len, self._parts[self._part :])) - self._at if self._parts else 0


def _read_inputs(document: Object, data: _Tail, signature: Signature, limits: Limits, shared: SharedRegions) -> Tensors:
    specs = signature.input_by_name
    inputs: Tensors = {}
    for item in _objects(document, "inputs", limits):
        name = item.get("name")
        if not isinstance(name, str):
            raise Refusal(400, "an input has no 'name'")
        spec = specs.get(name)
        if spec is None:
            raise Refusal(400, f"the model has no input {name!r}; allowed: {', '.join(map(repr, specs))}")
        if name in inputs:
            raise Refusal(400, f"input {name!r} is given twice")
        if item.get("datatype") != spec.datatype.name:
            raise Refusal(400, f"input {name!r} has datatype {item.get('datatype')!r}; allowed: {spec.datatype.name}")
        shape = check_shape(name, item.get("shape"), limits)
        parameters = _object(item, "parameters", f"input {name!r}") if "parameters" in item else {}
        size = parameters.get("binary_data_size")
        if size is None:
            inputs[name] = _read_elsewhere(name, spec.datatype, shape, item, parameters, shared)
            continue
        if "data" in item:
            raise Refusal(400, f"input {name!r} has both 'data' and 'binary_data_size'")
        inputs[name] = decode_binary(name, spec.datatype, shape, data.take(name, size))
    if data.left:
        raise Refusal(400, f"{data.left} bytes belong to no input")
    return inputs


def _read_elsewhere(
    name: str, datatype: Datatype, shape: tuple[int, ...], item: Object, parameters: Object, shared: SharedRegions
) -> Any:
    """Return an input whose values are in the JSON or in shared memory."""
    place = _shared_slice(f"input {name!r}", parameters) if parameters else None
    if place is None:
        return decode_json(name, datatype, shape, item.get("data"))
    if "data" in item:
        raise Refusal(400, f"input {name!r} has both 'data' and a shared memory region")
    return decode_binary(name, datatype, shape, memoryview(shared.read(place)))


def check_shape(name: str, value: object, limits: Limits) -> tuple[int, ...]:
    """Return a shape whose axes are known to be integers of at least 0; nothing is allocated for it.

    Raises:
        Refusal: It is no such shape, or has too many axes.
    """
    if not isinstance(value, list):
        raise Refusal(400, f"input {name!r} needs a 'shape' of integers")
    shape = cast(list[int], value)
    if len(shape) > limits.rank:
        raise Refusal(400, f"input {name!r} has more than {limits.rank} axes")
    count = 1
    for size in shape:
        if type(size) is not int:
            raise Refusal(400, f"input {name!r} needs a 'shape' of integers")
        if size < 0:
            raise Refusal(400, f"input {name!r}: no tensor has shape {shape}")
        count *= size
    if count > _MOST_ELEMENTS:
        raise Refusal(400, f"input {name!r}: no tensor has shape {shape}")
    return tuple(shape)


def _shared_slice(owner: str, parameters: Object) -> SharedSlice | None:
    region = parameters.get("shared_memory_region")
    size = parameters.get("shared_memory_byte_size")
    offset = parameters.get("shared_memory_offset", 0)
    if region is None and size is None:
        return None
    if not isinstance(region, str) or type(size) is not int or type(offset) is not int or size < 0 or offset < 0:
        raise Refusal(400, f"{owner} needs 'shared_memory_region' and 'shared_memory_byte_size', both valid")
    return SharedSlice(region, offset, size)


def _read_outputs(
    document: Object, parameters: Object, signature: Signature, limits: Limits
) -> tuple[RequestedOutput, ...]:
    binary = _flag(parameters, "binary_data_output", "the request", default=False)
    if document.get("outputs") is None:
        return tuple(RequestedOutput(spec, binary) for spec in signature.outputs)
    specs = {spec.name: spec for spec in signature.outputs}
    outputs: dict[str, RequestedOutput] = {}
    for item in _objects(document, "outputs", limits):
        name = item.get("name")
        if not isinstance(name, str) or name not in specs:
            raise Refusal(400, f"the model has no output {name!r}; allowed: {', '.join(map(repr, specs))}")
        if name in outputs:
            raise Refusal(400, f"output {name!r} is asked for twice")
        owner = f"output {name!r}"
        own = _object(item, "parameters", owner)
        if own.get("classification"):
            raise Refusal(501, f"{owner}: this server does not have the classification extension")
        shared = _shared_slice(owner, own)
        outputs[name] = RequestedOutput(specs[name], _flag(own, "binary_data", owner, default=binary), shared)
    return tuple(outputs.values()) or tuple(RequestedOutput(spec, binary) for spec in signature.outputs)


def _flag(parameters: Object, key: str, owner: str, *, default: bool) -> bool:
    value = parameters.get(key, default)
    if not isinstance(value, bool):
        raise Refusal(400, f"{key!r} of {owner} is neither true nor false")
    return value


def _apply(parameters: Object, request: InferRequest) -> None:
    """Apply the parameters that decide when the request runs."""
    for key in _UNSUPPORTED:
        if parameters.get(key):
            raise Refusal(501, f"{key!r}: this server keeps no sequences")
    priority = parameters.get("priority", 0)
    if type(priority) is not int or not 0 <= priority <= _MAX_PRIORITY:
        raise Refusal(400, f"'priority' is {priority!r}; allowed: 0 (the default) to {_MAX_PRIORITY}, 1 goes first")
    request.priority = priority
    timeout = parameters.get("timeout")
    if timeout is not None:
        if type(timeout) is not int or timeout < 0:
            raise Refusal(400, f"'timeout' is {timeout!r}; allowed: microseconds")
        request.timeout = timeout * 1e-6 if timeout else None


def _read_raw(body: bytes, signature: Signature) -> InferRequest:
    """Return a request whose body is the data of the only input; one row, and one unknown axis at most."""
    if len(signature.inputs) != 1:
        raise Refusal(400, f"a raw request needs a model with one input; this one has {len(signature.inputs)}")
    spec = signature.inputs[0]
    shape = list(spec.shape)
    if signature.batched:
        shape[0] = 1
    if spec.datatype.size == 0:
        tensor = decode_json(spec.name, spec.datatype, (), [""]).reshape([1] * len(shape))
        tensor.flat[0] = bytes(body)
    else:
        unknown = [axis for axis, size in enumerate(shape) if size == -1]
        known = math.prod(size for size in shape if size != -1) * spec.datatype.size
        if len(unknown) > 1:
            raise Refusal(400, f"a raw request leaves axes {unknown} of input {spec.name!r} open")
        for axis in unknown:
            shape[axis] = len(body) // known if known else 0
        tensor = decode_binary(spec.name, spec.datatype, shape, memoryview(body))
    inputs = {spec.name: tensor}
    outputs = tuple(RequestedOutput(output, binary=True) for output in signature.outputs)
    return InferRequest("", inputs, signature.check(inputs), outputs)

"""An inference request, read from JSON, from JSON with binary tensors behind it, or from one raw tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import orjson

from narrowcast.serving.datatypes import Datatype, decode_binary, decode_json
from narrowcast.serving.limits import Limits
from narrowcast.serving.refusals import Refusal, shown
from narrowcast.serving.signature import RequestedOutput, SharedSlice, Signature, Tensors

__all__ = [
    "InferRequest",
    "SharedRegions",
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


class SharedRegions(Protocol):
    """Reads and writes parts of regions; both refuse what lies outside one."""

    def read(self, place: SharedSlice) -> bytes: ...

    def write(self, place: SharedSlice, data: bytes | memoryview) -> None: ...


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
    inputs = _read_inputs(document, data, signature, limits, shared)
    rows = signature.check(inputs)
    identity = document.get("id", "")
    if not isinstance(identity, str):
        raise Refusal(400, "'id' is no text")
    parameters = _object(document, "parameters", "the request")
    outputs = _read_outputs(document, parameters, signature, limits)
    request = InferRequest(identity, inputs, rows, outputs)
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
    items = cast(list[Object], value)
    if len(items) > limits.tensors:
        raise Refusal(400, f"{key!r} has more than {limits.tensors} items")
    for item in items:
        if type(item) is not dict:
            raise Refusal(400, f"an item of {key!r} is no JSON object")
    return items


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
            raise Refusal(400, f"input {name!r}: 'binary_data_size' is {shown(size)}, but {left} bytes are left")
        self._at += size
        return self._parts[self._part][self._at - size : self._at] if self._parts else memoryview(b"")

    @property
    def left(self) -> int:
        """Bytes that nobody took."""
        return sum(map(len, self._parts[self._part :])) - self._at if self._parts else 0


_NO_TAIL = _Tail(())


def _read_inputs(
    document: Object, data: Sequence[memoryview], signature: Signature, limits: Limits, shared: SharedRegions
) -> Tensors:
    specs = signature.input_by_name
    tail = _Tail(data) if data else _NO_TAIL
    inputs: Tensors = {}
    left = limits.decompressed_bytes
    for item in _objects(document, "inputs", limits):
        name = item.get("name")
        if not isinstance(name, str):
            raise Refusal(400, "an input has no 'name'")
        spec = specs.get(name)
        if spec is None:
            raise Refusal(400, f"the model has no input {name!r}; allowed: {', '.join(map(repr, specs))}")
        if name in inputs:
            raise Refusal(400, f"input {name!r} is given twice")
        datatype = spec.datatype
        if item.get("datatype") != datatype.name:
            raise Refusal(400, f"input {name!r} has datatype {shown(item.get('datatype'))}; allowed: {datatype.name}")
        shape = _read_shape(name, item.get("shape"), limits)
        if "parameters" in item:
            inputs[name] = _read_elsewhere(name, datatype, shape, item, tail, shared, left)
            left -= inputs[name].nbytes
        else:
            inputs[name] = decode_json(name, datatype, shape, item.get("data"))
    if data and tail.left:
        raise Refusal(400, f"{tail.left} bytes belong to no input")
    return inputs


def _read_elsewhere(
    name: str, datatype: Datatype, shape: Sequence[int], item: Object, tail: _Tail, shared: SharedRegions, most: int
) -> Any:
    """Return an input whose parameters may say that its values are behind the JSON, or in shared memory.

    What is read of shared memory is bounded like a body: a region takes no memory before somebody writes to it.
    """
    parameters = _object(item, "parameters", f"input {name!r}")
    size = parameters.get("binary_data_size")
    place = _shared_slice("input", name, parameters)
    if size is None and place is None:
        return decode_json(name, datatype, shape, item.get("data"))
    if "data" in item or (size is not None and place is not None):
        raise Refusal(400, f"input {name!r} has more than one of 'data', 'binary_data_size' and a shared memory region")
    if place is not None and place.size > most:
        raise Refusal(
            413, f"input {name!r} takes {place.size} bytes of shared memory; allowed of a request: {most} more"
        )
    data = tail.take(name, size) if place is None else memoryview(shared.read(place))
    return decode_binary(name, datatype, shape, data)


def _read_shape(name: str, value: object, limits: Limits) -> Sequence[int]:
    """Return a shape whose axes are known to be integers of at least 0; nothing is allocated for it."""
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
        count *= size or 1  # an axis of length 0 makes no other axis smaller
    if count > _MOST_ELEMENTS:
        raise Refusal(400, f"input {name!r}: no tensor has shape {shape}")
    return shape


def _shared_slice(kind: str, name: str, parameters: Object) -> SharedSlice | None:
    region = parameters.get("shared_memory_region")
    size = parameters.get("shared_memory_byte_size")
    offset = parameters.get("shared_memory_offset", 0)
    if region is None and size is None:
        return None
    if not isinstance(region, str) or type(size) is not int or type(offset) is not int or size < 0 or offset < 0:
        raise Refusal(400, f"{kind} {name!r} needs 'shared_memory_region' and 'shared_memory_byte_size', both valid")
    return SharedSlice(region, offset, size)


def _read_outputs(
    document: Object, parameters: Object, signature: Signature, limits: Limits
) -> tuple[RequestedOutput, ...]:
    binary = _flag(parameters, "binary_data_output", "the request", default=False) if parameters else False
    if document.get("outputs") in (None, []):
        return signature.all_as_bytes if binary else signature.all_as_json
    return _read_named_outputs(document, binary, signature, limits)


def _read_named_outputs(
    document: Object, binary: bool, signature: Signature, limits: Limits
) -> tuple[RequestedOutput, ...]:
    specs = signature.output_by_name
    outputs: dict[str, RequestedOutput] = {}
    for item in _objects(document, "outputs", limits):
        name = item.get("name")
        if not isinstance(name, str) or name not in specs:
            raise Refusal(400, f"the model has no output {shown(name)}; allowed: {', '.join(map(repr, specs))}")
        if name in outputs:
            raise Refusal(400, f"output {name!r} is asked for twice")
        owner = f"output {name!r}"
        own = _object(item, "parameters", owner)
        if own.get("classification"):
            raise Refusal(501, f"{owner}: this server does not have the classification extension")
        shared = _shared_slice("output", name, own)
        outputs[name] = RequestedOutput(specs[name], _flag(own, "binary_data", owner, default=binary), shared)
    return tuple(outputs.values())


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
        raise Refusal(
            400, f"'priority' is {shown(priority)}; allowed: 0 (the default) to {_MAX_PRIORITY}, 1 goes first"
        )
    request.priority = priority
    timeout = parameters.get("timeout")
    if timeout is not None:
        if type(timeout) is not int or timeout < 0:
            raise Refusal(400, f"'timeout' is {shown(timeout)}; allowed: microseconds")
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
    return InferRequest("", inputs, signature.check(inputs), signature.all_as_bytes)

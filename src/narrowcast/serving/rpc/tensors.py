"""Inference requests and responses as protocol buffer messages."""

from __future__ import annotations

from typing import Any

import numpy as np

from narrowcast.oip.messages import INFERENCE
from narrowcast.serving.datatypes import DATATYPES, decode_binary, encode_binary
from narrowcast.serving.limits import Limits
from narrowcast.serving.protocol.requests import InferRequest, SharedRegions, read_document
from narrowcast.serving.protocol.responses import check_output, output_bytes, write_shared
from narrowcast.serving.refusals import Refusal
from narrowcast.serving.signature import Signature, Tensors

__all__ = ["read_message", "response_message"]

#: Elements of these can be what no JSON value is: NaN and infinity, and bytes that are no text.
_MORE_THAN_JSON = frozenset({"BYTES", "FP32", "FP64"})
_Response = INFERENCE["ModelInferResponse"]


def read_message(message: Any, signature: Signature, limits: Limits, shared: SharedRegions) -> InferRequest:
    """Return the request that a ``ModelInferRequest`` holds.

    Raises:
        Refusal: Anything does not fit.
    """
    plain = _read_plain(message, signature, limits)
    if plain is not None:
        return plain
    parts = [memoryview(part) for part in message.raw_input_contents]
    document: dict[str, Any] = {
        "id": message.id,
        "inputs": _read_inputs(message.inputs, parts),
        "outputs": [{"name": item.name, "parameters": _parameters(item.parameters)} for item in message.outputs],
    }
    if message.parameters:
        document["parameters"] = _parameters(message.parameters)
    return read_document(document, parts, signature, limits, shared)


def _read_plain(message: Any, signature: Signature, limits: Limits) -> InferRequest | None:
    """Return a request of the common kind, at half the cost; None for all others, and for most that do not fit.

    Its inputs are raw contents, and it has no parameters and names no outputs. What else there is, and what to say of a
    mistake, the general way knows.

    Raises:
        Refusal: The bytes do not fit a shape, an input is missing, or the inputs differ in their rows.
    """
    tensors, parts = message.inputs, message.raw_input_contents
    if len(tensors) != len(parts) or len(parts) > limits.tensors or message.parameters or message.outputs:
        return None
    specs = signature.input_by_name
    inputs: Tensors = {}
    for tensor, part in zip(tensors, parts, strict=True):
        name = tensor.name
        spec = specs.get(name)
        if spec is None or tensor.datatype != spec.datatype.name or name in inputs:
            return None
        shape = tuple(tensor.shape)
        if not spec.admits(shape) or min(shape, default=1) < 1 or tensor.parameters or tensor.HasField("contents"):
            return None
        inputs[name] = decode_binary(name, spec.datatype, shape, memoryview(part))
    return InferRequest(message.id, inputs, signature.check(inputs), signature.all_as_bytes)


def _read_inputs(tensors: Any, parts: list[memoryview]) -> list[dict[str, Any]]:
    """Return inputs as JSON has them; those of BYTES that are no raw contents yet are put behind the parts."""
    raw = len(parts)
    taken = 0
    inputs: list[dict[str, Any]] = []
    for tensor in tensors:
        item: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}
        inputs.append(item)
        parameters = _parameters(tensor.parameters) if tensor.parameters else {}
        if parameters:
            item["parameters"] = parameters
            parameters.pop("binary_data_size", None)  # of REST alone: here each part has a size of its own
        if "shared_memory_region" in parameters:
            continue
        if raw:
            if tensor.HasField("contents"):
                raise Refusal(400, f"input {tensor.name!r} has both contents and raw contents")
            if taken == raw:
                raise Refusal(400, f"there are {raw} raw contents, too few for input {tensor.name!r}")
            item["parameters"] = parameters | {"binary_data_size": len(parts[taken])}
            taken += 1
            continue
        datatype = DATATYPES.get(tensor.datatype)
        values = getattr(tensor.contents, datatype.contents) if datatype and datatype.contents else ()
        if datatype is not None and datatype.name in _MORE_THAN_JSON:
            parts.append(memoryview(encode_binary(datatype, np.array(list(values), datatype.dtype))))
            item["parameters"] = parameters | {"binary_data_size": len(parts[-1])}
        else:
            item["data"] = list(values)
    return inputs


def _parameters(given: Any) -> dict[str, Any]:
    """Return parameters by name."""
    return {key: getattr(value, kind) for key, value in given.items() if (kind := value.WhichOneof("choice"))}


def response_message(model: str, version: str, request: InferRequest, outputs: Tensors, shared: SharedRegions) -> Any:
    """Return the ``ModelInferResponse`` to a request; outputs are raw contents, one for each, in order.

    Raises:
        Refusal: An output cannot be sent as it was asked for.
    """
    message = _Response(model_name=model, model_version=version, id=request.id)
    for wanted in request.outputs:
        spec = wanted.spec
        array = check_output(wanted, outputs)
        item = message.outputs.add(name=spec.name, datatype=spec.datatype.name, shape=array.shape)
        data = output_bytes(spec, array)
        if wanted.shared is None:
            message.raw_output_contents.append(bytes(data))
            continue
        item.parameters["shared_memory_region"].string_param = wanted.shared.region
        item.parameters["shared_memory_offset"].int64_param = wanted.shared.offset
        item.parameters["shared_memory_byte_size"].int64_param = write_shared(spec.name, wanted.shared, data, shared)
        message.raw_output_contents.append(b"")  # clients find an output's data by its position
    return message

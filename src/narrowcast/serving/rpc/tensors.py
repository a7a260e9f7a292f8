"""Inference requests and responses as protocol buffer messages."""

from __future__ import annotations

import struct
from typing import Any

from narrowcast.oip.messages import INFERENCE
from narrowcast.serving.datatypes import DATATYPES, encode_binary
from narrowcast.serving.limits import Limits
from narrowcast.serving.protocol.requests import InferRequest, SharedRegions, read_document
from narrowcast.serving.protocol.responses import check_output, write_shared
from narrowcast.serving.refusals import Refusal
from narrowcast.serving.signature import Signature, Tensors

__all__ = ["read_message", "response_message"]

_LENGTH = struct.Struct("<I")
_Response = INFERENCE["ModelInferResponse"]


def read_message(message: Any, signature: Signature, limits: Limits, shared: SharedRegions) -> InferRequest:
    """Return the request that a ``ModelInferRequest`` holds.

    Raises:
        Refusal: Anything does not fit.
    """
    parts = [memoryview(part) for part in message.raw_input_contents]
    raw = bool(parts)
    inputs: list[dict[str, Any]] = []
    for tensor in message.inputs:
        parameters = _parameters(tensor.parameters)
        item = {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape), "parameters": parameters}
        inputs.append(item)
        if "shared_memory_region" in parameters:
            continue
        if raw:
            if tensor.HasField("contents"):
                raise Refusal(400, f"input {tensor.name!r} has both contents and raw contents")
            at = sum("binary_data_size" in known["parameters"] for known in inputs)
            if at >= len(parts):
                raise Refusal(400, f"there are {len(parts)} raw contents, too few for input {tensor.name!r}")
            parameters["binary_data_size"] = len(parts[at])
        elif tensor.datatype == "BYTES":
            parts.append(memoryview(_joined(tensor.contents.bytes_contents)))
            parameters["binary_data_size"] = len(parts[-1])
        else:
            datatype = DATATYPES.get(tensor.datatype)
            field = datatype.contents if datatype else ""
            item["data"] = list(getattr(tensor.contents, field)) if field else None
    document = {
        "id": message.id,
        "parameters": _parameters(message.parameters),
        "inputs": inputs,
        "outputs": [{"name": item.name, "parameters": _parameters(item.parameters)} for item in message.outputs]
        or None,
    }
    return read_document(document, parts, signature, limits, shared)


def _parameters(given: Any) -> dict[str, Any]:
    """Return parameters by name."""
    return {key: getattr(value, kind) for key, value in given.items() if (kind := value.WhichOneof("choice"))}


def _joined(elements: Any) -> bytes:
    """Return elements of BYTES behind their lengths, as raw contents have them."""
    return b"".join(part for element in elements for part in (_LENGTH.pack(len(element)), element))


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
        data = encode_binary(spec.datatype, array)
        if wanted.shared is None:
            message.raw_output_contents.append(bytes(data))
            continue
        item.parameters["shared_memory_region"].string_param = wanted.shared.region
        item.parameters["shared_memory_offset"].int64_param = wanted.shared.offset
        item.parameters["shared_memory_byte_size"].int64_param = write_shared(spec.name, wanted.shared, data, shared)
        message.raw_output_contents.append(b"")  # clients find an output's data by its position
    return message

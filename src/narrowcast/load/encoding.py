"""Requests as bytes, encoded once and sent many times."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from narrowcast.load.introduction import Introduction
from narrowcast.load.target import Target
from narrowcast.oip.datatypes import DATATYPES, as_bytes, encode_binary

__all__ = ["INFER", "Request", "encode_grpc", "encode_http"]

Array = NDArray[Any]

#: The gRPC method.
INFER = "/inference.GRPCInferenceService/ModelInfer"


@dataclass(frozen=True)
class Request:
    """A request that can be sent.

    Attributes:
        payload: All of it: head and body over HTTP, the message over gRPC.
        rows: Rows of its batch.
        body: Bytes without the head of HTTP.
    """

    payload: bytes
    rows: int
    body: int


def encode_http(
    target: Target, known: Introduction, tensors: Mapping[str, Array], rows: int, *, binary: bool
) -> Request:
    """Return a request of the REST protocol.

    Args:
        target: The server.
        known: The model.
        tensors: Its inputs.
        rows: Rows of the batch.
        binary: Whether tensors go, and come back, as bytes behind the JSON document.
    """
    inputs: list[dict[str, Any]] = []
    blobs: list[bytes] = []
    for spec in known.inputs:
        array = tensors[spec.name]
        item: dict[str, Any] = {"name": spec.name, "shape": list(array.shape), "datatype": spec.datatype}
        if binary:
            blobs.append(bytes(encode_binary(DATATYPES[spec.datatype], array)))
            item["parameters"] = {"binary_data_size": len(blobs[-1])}
        else:
            item["data"] = _values(array)
        inputs.append(item)
    document: dict[str, Any] = {"inputs": inputs}
    if binary:
        document["parameters"] = {"binary_data_output": True}
    header = json.dumps(document, separators=(",", ":")).encode()
    body = b"".join((header, *blobs))
    version = f"/versions/{quote(known.model_version, safe='')}" if known.model_version else ""
    head = [
        f"POST {target.prefix}/v2/models/{quote(known.model, safe='')}{version}/infer HTTP/1.1",
        f"Host: {target.name}",
        *(f"{name}: {value}" for name, value in target.access.others),
        f"Content-Type: {'application/octet-stream' if binary else 'application/json'}",
        f"Content-Length: {len(body)}",
        *([f"Inference-Header-Content-Length: {len(header)}"] if binary else []),
    ]
    return Request("\r\n".join((*head, "", "")).encode() + body, rows, len(body))


def encode_grpc(known: Introduction, tensors: Mapping[str, Array], rows: int) -> Request:
    """Return a request of the gRPC protocol, tensors as raw bytes."""
    from narrowcast.oip.messages import INFERENCE

    message = INFERENCE["ModelInferRequest"](model_name=known.model, model_version=known.model_version)
    for spec in known.inputs:
        array = tensors[spec.name]
        message.inputs.add(name=spec.name, datatype=spec.datatype, shape=array.shape)
        message.raw_input_contents.append(bytes(encode_binary(DATATYPES[spec.datatype], array)))
    payload = message.SerializeToString()
    return Request(payload, rows, len(payload))


def _values(array: Array) -> list[Any]:
    """Return a tensor as a flat JSON array."""
    if array.dtype == object:
        return [as_bytes(element).decode(errors="replace") for element in array.flat]
    if array.dtype.kind not in "biu":  # numbers that JSON can hold exactly
        array = array.astype(np.float64)
    return array.reshape(-1).tolist()

"""An inference response: JSON, with the data of binary tensors behind it."""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson

from narrowcast.serving.datatypes import encode_binary, encode_json, finite
from narrowcast.serving.http.message import Body, Response
from narrowcast.serving.protocol.requests import InferRequest, SharedRegions
from narrowcast.serving.refusals import Refusal
from narrowcast.serving.signature import RequestedOutput, SharedSlice, Tensors, TensorSpec

__all__ = ["check_output", "infer_response", "output_bytes", "write_shared"]

_OCTETS = b"application/octet-stream"
#: Shapes of an output that are remembered to fit.
_MOST_SHAPES = 256


def infer_response(
    model: str, version: str, request: InferRequest, outputs: Tensors, shared: SharedRegions
) -> Response:
    """Return the answer to an inference request.

    Args:
        model: Name of the model that ran.
        version: Its version.
        request: What was asked.
        outputs: All outputs of the model, by name.
        shared: Regions of shared memory that outputs may go to.

    Raises:
        Refusal: An output cannot be sent as it was asked for.
    """
    described: list[dict[str, Any]] = []
    document: dict[str, Any] = {"model_name": model, "model_version": version}
    if request.id:
        document["id"] = request.id
    document["outputs"] = described
    binary: list[Body] = []
    for wanted in request.outputs:
        spec = wanted.spec
        array = check_output(wanted, outputs)
        item: dict[str, Any] = {"name": spec.name, "datatype": spec.datatype.name, "shape": array.shape}
        described.append(item)
        if wanted.shared is not None:
            size = write_shared(spec.name, wanted.shared, output_bytes(spec, array), shared)
            item["parameters"] = {
                "shared_memory_region": wanted.shared.region,
                "shared_memory_offset": wanted.shared.offset,
                "shared_memory_byte_size": size,
                "binary_data_size": 0,  # NVIDIA's C++ client looks for it wherever there are parameters
            }
        elif wanted.binary:
            data = output_bytes(spec, array)
            item["parameters"] = {"binary_data_size": len(data)}
            binary.append(data)
        else:
            item["data"] = encode_json(spec.name, spec.datatype, array)
    head = orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
    if b"null" in head:
        _check_finite(request, outputs)
    if not binary:
        return Response(200, (head,))
    return Response(200, (head, *binary), _OCTETS, ((b"Inference-Header-Content-Length", b"%d" % len(head)),))


def _check_finite(request: InferRequest, outputs: Tensors) -> None:
    """Check outputs that were written as JSON and may hold what JSON has not.

    Raises:
        Refusal: One does; the client can ask for bytes instead.
    """
    for wanted in request.outputs:
        spec = wanted.spec
        if not wanted.binary and wanted.shared is None and not finite(spec.datatype, outputs[spec.name]):
            raise Refusal(
                400, f"output {spec.name!r} holds NaN or infinity, which JSON has not; ask for it with 'binary_data'"
            )


def check_output(wanted: RequestedOutput, outputs: Tensors) -> Any:
    """Return one output of a model.

    Raises:
        Refusal: The model gave none of that name, or one of another element type or shape (500: the model is at fault).
    """
    spec = wanted.spec
    array: Any = outputs.get(spec.name)
    if isinstance(array, np.ndarray) and array.dtype == spec.datatype.dtype:
        shape = array.shape
        if shape in spec.admitted:  # as nearly always: shapes repeat
            return array  # pyright: ignore[reportUnknownVariableType]  its element type is known by now
        if spec.admits(shape):
            if len(spec.admitted) >= _MOST_SHAPES:
                spec.admitted.clear()
            spec.admitted.add(shape)
            return array  # pyright: ignore[reportUnknownVariableType]
    raise _contradiction(spec, array)


def _contradiction(spec: TensorSpec, given: Any) -> Refusal:
    """Return what is said of an output that is not what the model promised."""
    found = "nothing" if given is None else f"no array but {type(given).__name__}"
    if isinstance(given, np.ndarray):
        found = f"{given.dtype} {list(given.shape)}"
    return Refusal(
        500,
        f"the model gave {found} for output {spec.name!r}, which is {spec.datatype.name} {list(spec.shape)} (-1: any)",
    )


def output_bytes(spec: TensorSpec, array: Any) -> bytes | memoryview:
    """Return an output as bytes.

    Raises:
        Refusal: An element of BYTES is neither text nor bytes (500: the model is at fault).
    """
    try:
        return encode_binary(spec.datatype, array)
    except TypeError as error:
        raise Refusal(500, f"the model gave an element of output {spec.name!r} that is no text: {error}") from error


def write_shared(name: str, place: SharedSlice, data: bytes | memoryview, shared: SharedRegions) -> int:
    """Write an output to shared memory, and return its size in bytes.

    Raises:
        Refusal: The place is too small, or is none.
    """
    if len(data) > place.size:
        raise Refusal(400, f"output {name!r} takes {len(data)} bytes, but its shared memory has {place.size}")
    shared.write(SharedSlice(place.region, place.offset, len(data)), data)
    return len(data)

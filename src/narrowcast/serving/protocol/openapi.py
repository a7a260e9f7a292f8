"""The REST protocol as an OpenAPI 3.1 document: what this server does, and nothing that it does not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from narrowcast._version import __version__
from narrowcast.oip.datatypes import DATATYPES

__all__ = ["openapi"]

Object = dict[str, Any]

_ERRORS = {
    "400": "The request cannot be read, or does not fit the model.",
    "401": "The administrators' token is missing or wrong.",
    "403": "The server was started without what this needs.",
    "404": "There is no such model, version or target.",
    "408": "The request took too long to arrive.",
    "413": "The body is too large, as it came or after decompression.",
    "415": "The content encoding is unknown.",
    "417": "Something else than 100-continue is expected.",
    "429": "The answer would come after the deadline; Retry-After says when to come again.",
    "431": "The headers are too large.",
    "500": "The model or the server failed.",
    "501": "The request needs an extension that this server does not have.",
    "503": "Nothing can run the request now; Retry-After says when to come again.",
    "504": "The deadline has passed, or the model ran or loaded too long.",
    "507": "The model does not fit into the memory that models may take.",
}
#: Of every request, whatever it asks for.
_ALWAYS = ("400", "404", "408", "413", "415", "417", "431", "500", "503")

_TEXT: Object = {"type": "string"}
_FLAG: Object = {"type": "boolean"}
_COUNT: Object = {"type": "integer", "minimum": 0}
_ANY: Object = {"type": "object"}


def _ref(name: str) -> Object:
    return {"$ref": f"#/components/schemas/{name}"}


def _list(items: Object) -> Object:
    return {"type": "array", "items": items}


def _record(fields: Mapping[str, Object], *, optional: Iterable[str] = ()) -> Object:
    """Return an object whose fields are all there, but for the optional ones."""
    required = [name for name in fields if name not in set(optional)]
    return {"type": "object", "properties": dict(fields), "required": required}


_SHAPE: Object = _list(_COUNT) | {"maxItems": 32}
_DATATYPE: Object = {"type": "string", "enum": list(DATATYPES)}
_PLACE: Object = {
    "shared_memory_region": _TEXT,
    "shared_memory_offset": _COUNT,
    "shared_memory_byte_size": _COUNT,
}
_DURATION = _record({"count": _COUNT, "ns": _COUNT})
_DURATIONS = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output", "cache_hit", "cache_miss")

_SCHEMAS: Object = {
    "Error": _record({"error": _TEXT}),
    "Metadata": _record({"name": _TEXT, "version": _TEXT, "extensions": _list(_TEXT)}),
    "Tensor": _record({"name": _TEXT, "datatype": _DATATYPE, "shape": _list({"type": "integer", "minimum": -1})}),
    "Model": _record(
        {
            "name": _TEXT,
            "versions": _list(_TEXT),
            "platform": _TEXT,
            "inputs": _list(_ref("Tensor")),
            "outputs": _list(_ref("Tensor")),
        }
    ),
    "Configuration": {
        "type": "object",
        "description": "How a model is served, in the terms of Triton's configuration.",
        "required": ["name", "platform", "max_batch_size", "input", "output"],
    },
    "Duration": _DURATION,
    "Statistics": _record(
        {
            "model_stats": _list(
                _record(
                    {
                        "name": _TEXT,
                        "version": _TEXT,
                        "last_inference": _COUNT,
                        "inference_count": _COUNT,
                        "execution_count": _COUNT,
                        "inference_stats": _record({name: _ref("Duration") for name in _DURATIONS}),
                        "batch_stats": _list(_ANY),
                    }
                )
            )
        }
    ),
    "Input": _record(
        {
            "name": _TEXT,
            "shape": _SHAPE,
            "datatype": _DATATYPE,
            "parameters": _record({"binary_data_size": _COUNT, **_PLACE}, optional=("binary_data_size", *_PLACE)),
            "data": {"type": "array", "description": "Values, flat in row-major order or nested like the shape."},
        },
        optional=("parameters", "data"),
    ),
    "WantedOutput": _record(
        {
            "name": _TEXT,
            "parameters": _record({"binary_data": _FLAG, **_PLACE}, optional=("binary_data", *_PLACE)),
        },
        optional=("parameters",),
    ),
    "InferRequest": _record(
        {
            "id": _TEXT,
            "inputs": _list(_ref("Input")) | {"maxItems": 256},
            "outputs": _list(_ref("WantedOutput")) | {"maxItems": 256},
            "parameters": _record(
                {
                    "priority": {"type": "integer", "minimum": 0, "description": "1 goes first; 0 is the default."},
                    "timeout": _COUNT | {"description": "Microseconds that the client waits; 0: as if not given."},
                    "binary_data_output": _FLAG,
                },
                optional=("priority", "timeout", "binary_data_output"),
            ),
        },
        optional=("id", "outputs", "parameters"),
    ),
    "InferResponse": _record(
        {
            "model_name": _TEXT,
            "model_version": _TEXT,
            "id": _TEXT,
            "outputs": _list(
                _record(
                    {
                        "name": _TEXT,
                        "datatype": _DATATYPE,
                        "shape": _SHAPE,
                        "data": {"type": "array"},
                        "parameters": _ANY,
                    },
                    optional=("data", "parameters"),
                )
            ),
        },
        optional=("id",),
    ),
    "Index": _list(_record({"name": _TEXT, "version": _TEXT, "state": _TEXT, "reason": _TEXT})),
    "Change": _record({"traffic": _ANY, "kept": _FLAG, "reason": _TEXT}, optional=("reason",)),
    "Regions": _list(_record({"name": _TEXT, "key": _TEXT, "offset": _COUNT, "byte_size": _COUNT})),
}

_OCTETS = "application/octet-stream"
_HEADER_LENGTH: Object = {
    "name": "Inference-Header-Content-Length",
    "in": "header",
    "description": "Length of the JSON in bytes, where binary data follow it; 0: the body is the data of the only input.",
    "schema": _COUNT,
}


def _operation(
    name: str,
    summary: str,
    answer: Object,
    *,
    body: Object | None = None,
    needed: bool = False,
    errors: tuple[str, ...] = (),
    admin: bool = False,
) -> Object:
    """Return one operation.

    Args:
        name: Its ``operationId``.
        summary: What it does.
        answer: Schema of the JSON that it answers with.
        body: Schema of the JSON that it takes, if any.
        needed: Whether an empty body is refused.
        errors: Statuses beyond those that every request can get.
        admin: Whether it needs the administrators' token.
    """
    statuses = sorted({*_ALWAYS, *errors, *(("401", "403") if admin else ())})
    answers: Object = {"200": {"description": "Done.", "content": {"application/json": {"schema": answer}}}}
    for status in statuses:
        answers[status] = {"description": _ERRORS[status], "content": {"application/json": {"schema": _ref("Error")}}}
    operation: Object = {"operationId": name, "summary": summary, "responses": answers}
    if body is not None:
        operation["requestBody"] = {"content": {"application/json": {"schema": body}}, "required": needed}
    if admin:
        operation["security"] = [{"administrators": []}]
    return operation


def _infer() -> Object:
    operation = _operation(
        "infer",
        "Run the model",
        _ref("InferResponse"),
        body=_ref("InferRequest"),
        needed=True,
        errors=("403", "429", "501", "504", "507"),
    )
    octets: Object = {_OCTETS: {"schema": {"type": "string", "format": "binary"}}}
    operation["parameters"] = [_HEADER_LENGTH]
    operation["requestBody"]["content"] |= octets
    operation["responses"]["200"]["content"] |= octets
    return operation


def _model_paths(prefix: str, suffix: str) -> Object:
    """Return what can be asked of a model, or of one of its versions."""
    cold = ("503", "504", "507")
    return {
        prefix: {"get": _operation(f"metadata{suffix}", "Inputs and outputs", _ref("Model"), errors=cold)},
        f"{prefix}/ready": {
            "get": _operation(
                f"ready{suffix}", "Whether requests can run", _record({"name": _TEXT, "ready": _FLAG}), errors=cold
            )
        },
        f"{prefix}/config": {
            "get": _operation(f"config{suffix}", "How the model is served", _ref("Configuration"), errors=cold)
        },
        f"{prefix}/stats": {"get": _operation(f"statistics{suffix}", "What was counted", _ref("Statistics"))},
        f"{prefix}/infer": {"post": _infer() | {"operationId": f"infer{suffix}"}},
    }


def _repository_paths() -> Object:
    prefix = "/v2/repository/models/{name}"
    changes = {
        f"{prefix}/load": ("load", "Load the versions that the policy selects", ("501", "504", "507")),
        f"{prefix}/unload": ("unload", "Unload a model", ()),
        f"{prefix}/versions/{{version}}/promote": ("promote", "Let a version answer", ("504", "507")),
        f"{prefix}/rollback": ("rollback", "Let what answered before answer again", ("504", "507")),
    }
    traffic = _record({"traffic": _ANY})
    weights = _record({"weights": {"type": "object", "additionalProperties": {"type": "number"}}})
    paths: Object = {
        "/v2/repository/index": {
            "post": _operation(
                "index", "All models and versions", _ref("Index"), body=_record({"ready": _FLAG}, optional=("ready",))
            )
        },
        f"{prefix}/traffic": {
            "get": _operation("traffic", "Which versions answer", traffic),
            "post": _operation(
                "split",
                "Split requests among versions",
                _ref("Change"),
                body=weights | {"additionalProperties": False},
                needed=True,
                errors=("504", "507"),
                admin=True,
            ),
        },
    }
    for path, (name, summary, errors) in changes.items():
        paths[path] = {"post": _operation(name, summary, _ref("Change"), errors=errors, admin=True)}
    return paths


def _shared_paths() -> Object:
    prefix = "/v2/systemsharedmemory"
    region = f"{prefix}/region/{{region}}"
    place = _record(
        {"key": _TEXT, "offset": _COUNT, "byte_size": {"type": "integer", "minimum": 1}}, optional=["offset"]
    )
    return {
        f"{prefix}/status": {"get": _operation("regions", "All shared memory regions", _ref("Regions"))},
        f"{region}/status": {"get": _operation("region", "One shared memory region", _ref("Regions"))},
        f"{region}/register": {
            "post": _operation("register", "Register a region", _ANY, body=place, needed=True, errors=("403",))
        },
        f"{region}/unregister": {"post": _operation("unregister", "Unregister a region", _ANY)},
        f"{prefix}/unregister": {"post": _operation("unregister_all", "Unregister all regions", _ANY)},
    }


@cache
def openapi() -> Object:
    """Return the document."""
    model = "/v2/models/{name}"
    paths: Object = {
        "/v2": {"get": _operation("server", "Name, version and extensions", _ref("Metadata"))},
        "/v2/health/live": {"get": _operation("live", "Whether the server answers", _record({"live": _FLAG}))},
        "/v2/health/ready": {
            "get": _operation("ready", "Whether every model can run requests", _record({"ready": _FLAG}))
        },
        "/v2/models/stats": {"get": _operation("statistics", "What was counted, of all models", _ref("Statistics"))},
        **_model_paths(model, "_model"),
        **_model_paths(f"{model}/versions/{{version}}", "_version"),
        **_repository_paths(),
        **_shared_paths(),
        "/openapi.json": {"get": _operation("openapi", "This document", _ANY)},
    }
    for path, item in paths.items():
        names = [part[1:-1] for part in path.split("/") if part.startswith("{")]
        if names:
            item["parameters"] = [{"name": name, "in": "path", "required": True, "schema": _TEXT} for name in names]
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "narrowcast",
            "version": __version__,
            "description": "Open Inference Protocol, version 2, over REST.",
        },
        "paths": paths,
        "components": {
            "schemas": _SCHEMAS,
            "securitySchemes": {"administrators": {"type": "http", "scheme": "bearer"}},
        },
    }

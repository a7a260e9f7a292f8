"""The document that describes the REST protocol, held against a server by schemathesis."""

from __future__ import annotations

import re
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from jsonschema import Draft202012Validator
from schemathesis.checks import CHECKS
from serving_models import function, request

from narrowcast.serving.catalogue import Hosting
from narrowcast.serving.protocol.openapi import openapi
from narrowcast.serving.rest import _ROUTES
from narrowcast.serving.workers.sources import Placement

SCHEMA = schemathesis.openapi.from_dict(openapi())
NAMES = {"name": ["double", "double", "none"], "version": ["1", "1", "2", "x"], "region": ["r", "s"]}
#: A document cannot say which shapes and types a model takes, so some of what fits it is refused, as it should be.
ALL_BUT_ACCEPTANCE = ("positive_data_acceptance",)


@pytest.fixture(scope="module")
def running(serve_once: Any) -> Any:
    return serve_once({"double": function()}, hosting=Hosting(Placement.INLINE), shared_memory=True)


def test_the_document_names_every_target_and_no_other() -> None:
    described = {
        (method.upper(), re.sub(r"\{\w+\}", "name", path))
        for path, item in openapi()["paths"].items()
        for method in item
        if method != "parameters"
    }
    for method, target in described:
        assert any(known == method and pattern.fullmatch(target) for known, pattern, _ in _ROUTES), (method, target)
    for method, pattern, endpoint in _ROUTES:
        assert any(known == method and pattern.fullmatch(target) for known, target in described), endpoint


def test_the_served_document_is_one(running: Any) -> None:
    answer = running.ask("GET", "/openapi.json")
    assert answer.json == openapi()
    for schema in answer.json["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)


def test_a_real_answer_fits_the_document(running: Any) -> None:
    document = openapi()
    for target, name, body in (
        ("/v2/models/double/infer", "InferResponse", request(1, id="7")),
        ("/v2/models/double", "Model", b""),
        ("/v2/models/stats", "Statistics", b""),
        ("/v2/models/none", "Error", b""),
    ):
        answer = running.ask("POST" if body else "GET", target, body)
        schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
        Draft202012Validator(schema).validate(answer.json)


@SCHEMA.parametrize()
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def test_the_server_does_what_the_document_says(case: Any, running: Any) -> None:
    for name in case.path_parameters or {}:  # what is there as often as what is not
        case.path_parameters[name] = NAMES[name][len(str(case.body)) % len(NAMES[name])]
    excluded = [check for check in CHECKS.get_all() if check.__name__ in ALL_BUT_ACCEPTANCE]
    case.call_and_validate(base_url=f"http://{running.address}", excluded_checks=excluded)

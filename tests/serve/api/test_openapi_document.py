"""The OpenAPI document is whole: every route, every status with a body, every reference, every field that is known."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace
from typing import Any

import pytest

from onebase.serve.api.app import create_app
from onebase.serve.api.completion_schemas import CompletionRequest
from onebase.serve.api.openapi_answers import MEANINGS, ROUTES
from onebase.serve.config import Settings
from onebase.serve.engine.messages import EngineInfo, EngineStats


@pytest.fixture(scope="module")
def document() -> Any:
    info = EngineInfo("llama", "f", "cpu", "float32", 10, 10, 16, 10, 10, ())
    engine: Any = SimpleNamespace(stats=EngineStats(), info=info, ready=True, restarts=0)
    return create_app(Settings(model="base"), engine).openapi()


def _operations(document: Any) -> dict[str, Any]:
    paths = document["paths"].items()
    return {f"{verb.upper()} {path}": one for path, operations in paths for verb, one in operations.items()}


def test_every_route_says_what_it_answers(document: Any) -> None:
    assert _operations(document).keys() == ROUTES.keys()
    for name, operation in _operations(document).items():
        assert {int(status) for status in operation["responses"]} <= MEANINGS.keys(), name
        assert "422" not in operation["responses"], name
        for status, answer in operation["responses"].items():
            (first, *_) = answer["content"].values()
            assert first["schema"], (name, status)
            assert "x-request-id" in answer["headers"], (name, status)
        assert operation["summary"], name
        assert ("key" in str(operation.get("security"))) == ("401" in operation["responses"]), name


def test_every_reference_leads_somewhere(document: Any) -> None:
    schemas = document["components"]["schemas"]
    assert set(re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(document))) <= schemas.keys()
    named = {operation["operationId"] for operation in _operations(document).values()}
    assert (
        set(re.findall(r'"operationId": "([^"]+)", "(?:parameters|requestBody)": {"\w+": "\$', json.dumps(document)))
        <= named
    )


def test_bodies_are_closed_and_know_what_is_not_served(document: Any) -> None:
    drawn = document["components"]["schemas"]["CompletionRequest"]
    assert drawn["additionalProperties"] is False
    assert CompletionRequest.not_yet
    for field, neutral in CompletionRequest.not_yet.items():
        assert drawn["properties"][field]["enum"] == [None, *neutral]
    form = document["paths"]["/v1/adapters"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert form["required"] == ["name", "files"]


def test_query_parameters_have_no_null(document: Any) -> None:
    for name, operation in _operations(document).items():
        for parameter in operation.get("parameters", []):
            assert '"null"' not in json.dumps(parameter), name

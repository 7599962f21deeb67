"""The OpenAPI document: every route with its parameters, its body, its answers, and what follows from them.

FastAPI sees no schemas: bodies are read by body.py after the key is checked, and answers are written by hand. Its own
422 is left out: what is malformed is 400.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from onebase.serve.api import (
    adapter_schemas,
    chat_schemas,
    completion_schemas,
    pooling_schemas,
    response_schemas,
    tokenize_schemas,
)
from onebase.serve.api.answer_schemas import ErrorAnswer
from onebase.serve.api.openapi_answers import ADMIN, API, EVENTS, MEANINGS, ROUTES, Route

BODIES = (
    completion_schemas.CompletionRequest,
    chat_schemas.ChatRequest,
    response_schemas.ResponseRequest,
    pooling_schemas.ClassifyRequest,
    pooling_schemas.EmbeddingRequest,
    tokenize_schemas.TokenizeRequest,
    tokenize_schemas.DetokenizeRequest,
    adapter_schemas.AdapterSource,
    adapter_schemas.AdapterChange,
    adapter_schemas.Rollback,
    adapter_schemas.Collect,
    adapter_schemas.LoadLora,
    adapter_schemas.UnloadLora,
)
_REFERENCE = "#/components/schemas/{model}"
_NAMED = "/v1/adapters/{name}"
_KEY = {"type": "http", "scheme": "bearer"}
_EVENT = {  # of a stream: a chunk as JSON, an error, or [DONE]
    "type": "object",
    "properties": {"data": {"type": "string"}, "event": {"type": "string"}},
    "required": ["data"],
}
HEADERS: Mapping[str, Any] = {
    "x-request-id": {"description": "The request's own, or a fresh one.", "schema": {"type": "string"}}
}


def document(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        drawn = get_openapi(title=app.title, version=app.version, routes=app.routes)
        components = drawn.setdefault("components", {})
        components["schemas"] = _schemas()
        components["securitySchemes"] = {"key": _KEY, "admin_key": _KEY}
        for path, operations in drawn["paths"].items():
            for method, operation in operations.items():
                _complete(operation, ROUTES[f"{method.upper()} {path}"])
        _link(drawn["paths"])
        app.openapi_schema = drawn
    return app.openapi_schema


def _schemas() -> dict[str, Any]:
    answers = [schema for route in ROUTES.values() for schema in route.done.values() if not isinstance(schema, str)]
    bodies = [(body, "validation") for body in BODIES]
    written = [(answer, "serialization") for answer in dict.fromkeys([ErrorAnswer, *answers])]
    _, definitions = models_json_schema([*bodies, *written], ref_template=_REFERENCE)  # type: ignore[list-item]
    schemas: dict[str, Any] = definitions["$defs"]
    return schemas


def _complete(operation: dict[str, Any], route: Route) -> None:
    """Answers and keys of one operation."""
    operation["responses"] = {str(status): answer for status, answer in sorted(_answers(route))}
    if route.errors >= API:
        operation["security"] = [{"admin_key" if route.errors >= ADMIN else "key": []}, {}]


def _answers(route: Route) -> Iterator[tuple[int, dict[str, Any]]]:
    for status, body in route.done.items():
        content = {body: {"schema": {"type": "string"}}} if isinstance(body, str) else _json(body)
        if route.streams and status == 200:
            content |= {EVENTS: {"schema": _EVENT}}
        yield status, _answer(status, content)
    for status in route.errors | {400, 403, 500}:  # of any route: an odd query, another host's name, a defect
        yield status, _answer(status, _json(ErrorAnswer))


def _answer(status: int, content: dict[str, Any]) -> dict[str, Any]:
    return {"description": MEANINGS[status], "headers": dict(HEADERS), "content": content}


def _json(schema: type[BaseModel]) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": _REFERENCE.format(model=schema.__name__)}}}


def _link(paths: dict[str, Any]) -> None:
    """What can be asked next about what an answer names."""
    named = {path: operations for path, operations in paths.items() if path.startswith(_NAMED)}
    made = paths["/v1/adapters"]["post"]["responses"]
    for path, operations in named.items():
        for method, operation in operations.items():
            link = {"operationId": operation["operationId"], "parameters": {"name": "$response.body#/name"}}
            for status in ("201", "202"):
                made[status].setdefault("links", {})[f"{method} {path.removeprefix(_NAMED)}".strip()] = link
    first = {"model": "$response.body#/data/0/id"}
    one = paths["/v1/models/{model}"]["get"]["operationId"]
    paths["/v1/models"]["get"]["responses"]["200"]["links"] = {"model": {"operationId": one, "parameters": first}}
    back = {"operationId": paths["/detokenize"]["post"]["operationId"]}
    ids = {"requestBody": {"tokens": "$response.body#/tokens"}}
    paths["/tokenize"]["post"]["responses"]["200"]["links"] = {"text": back | ids}

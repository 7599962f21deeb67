"""The OpenAPI document. Bodies are read by body.py after the key is checked, so FastAPI does not see their schemas."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from onebase.serve.api import adapter_schemas, chat_schemas, completion_schemas, pooling_schemas, tokenize_schemas

BODIES = (
    completion_schemas.CompletionRequest,
    chat_schemas.ChatRequest,
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


def document(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        drawn = get_openapi(title=app.title, version=app.version, routes=app.routes)
        _, definitions = models_json_schema(
            [(body, "validation") for body in BODIES], ref_template="#/components/schemas/{model}"
        )
        drawn.setdefault("components", {}).setdefault("schemas", {}).update(definitions["$defs"])
        app.openapi_schema = drawn
    return app.openapi_schema

"""Reading bodies: never more bytes than allowed, JSON only where JSON is meant, and 400 for every wrong type."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError

from onebase.serve.api.errors import ApiError, bad_request, from_validation
from onebase.serve.api.json_size import json_size
from onebase.serve.api.state import server_of

MAX_JSON_BYTES = 32 << 20
LONG_BODY = 64 << 10  # bytes; shorter bodies are validated faster than a thread is woken

T = TypeVar("T", bound=BaseModel)


async def read_json(request: Request, schema: type[T]) -> T:
    """The body as ``schema``, long ones in a thread. Raises ApiError 400, or 413 over MAX_JSON_BYTES."""
    kind = content_type(request)
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise bad_request("The body must be JSON, with Content-Type: application/json.", code="invalid_content_type")
    data = bytearray()
    async for chunk in capped(request, MAX_JSON_BYTES):
        data += chunk
    try:
        if len(data) <= LONG_BODY:
            return schema.model_validate_json(data)
        parsers = server_of(request).parsers
        return await asyncio.get_running_loop().run_in_executor(parsers, _parse_long, schema, data)
    except ValidationError as error:
        raise from_validation(error) from error


def _parse_long(schema: type[T], data: bytearray) -> T:
    """Raises ValidationError, and ApiError 400 for what would hold the interpreter for long."""
    if (excess := json_size(data).excess) is not None:
        raise bad_request(f"The body has {excess}: send less at once.", code="invalid_json")
    return schema.model_validate_json(data)


async def capped(request: Request, limit: int) -> AsyncIterator[bytes]:
    """The body in chunks. A declared length over the limit is refused before anything is read."""
    declared = request.headers.get("content-length", "0")
    size = int(declared) if declared.isdecimal() else 0
    if size > limit:
        raise _too_large(limit)
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise _too_large(limit)
        yield chunk


def content_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def has_body(request: Request) -> bool:
    """Whether the client announced one, be it empty. For routes where it may be left out."""
    return request.headers.get("content-length", "0") != "0" or "transfer-encoding" in request.headers


def form_body(schema: type[BaseModel]) -> dict[str, Any]:
    """The same for an upload's form, or JSON in its place."""
    file = {"type": "string", "format": "binary"}
    properties = {"name": {"type": "string"}, "files": {"type": "array", "items": file, "minItems": 1}}
    form = {"type": "object", "required": ["name", "files"], "properties": properties, "additionalProperties": False}
    drawn = json_body(schema)
    drawn["requestBody"]["content"]["multipart/form-data"] = {"schema": form}
    return drawn


def json_body(schema: type[BaseModel], *, required: bool = True) -> dict[str, Any]:
    """The body's place in the OpenAPI document; openapi.py adds the schema itself."""
    reference = {"$ref": f"#/components/schemas/{schema.__name__}"}
    return {"requestBody": {"required": required, "content": {"application/json": {"schema": reference}}}}


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"The body is over the limit of {limit} bytes.", code="body_too_large")

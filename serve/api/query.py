"""Query strings, as strict as bodies: what is unknown, doubled or malformed is 400 with its name."""

from __future__ import annotations

from typing import Any, TypeVar, cast

from fastapi import Request
from pydantic import BaseModel, ConfigDict, ValidationError

from onebase.serve.api.body import has_body
from onebase.serve.api.errors import ApiError, bad_request, from_validation


class Query(BaseModel):
    """Parameters of a route. Each is read from text; a field that is a list may be repeated."""

    model_config = ConfigDict(extra="forbid", frozen=True)


T = TypeVar("T", bound=Query)


def read_query(request: Request, schema: type[T]) -> T:
    """Raises ApiError 400."""
    given: dict[str, str | list[str]] = {}
    for key, value in request.query_params.multi_items():
        if _repeats(schema, key):
            cast(list[str], given.setdefault(key, [])).append(value)
        elif key in given:
            raise bad_request(f"{key[:100]}: given twice.", key[:100])
        else:
            given[key] = value
    try:
        return schema.model_validate(given)
    except ValidationError as error:
        raise _with_allowed(from_validation(error), schema) from error


def refuse_unread(request: Request) -> None:
    """For routers: a query parameter or a body that the route's place in the OpenAPI document does not have is 400."""
    declared = getattr(request.scope["route"], "openapi_extra", None) or {}
    if "parameters" not in declared:
        read_query(request, Query)
    if "requestBody" not in declared and has_body(request):
        raise bad_request(f"{request.method} {request.url.path} takes no body: options stand in the query string.")


def query_parameters(schema: type[Query]) -> dict[str, Any]:
    """The parameters' place in the OpenAPI document."""
    properties = schema.model_json_schema()["properties"]
    drawn = {name: _unless_null(one) for name, one in properties.items()}
    return {"parameters": [{"name": name, "in": "query", "schema": one} for name, one in drawn.items()]}


def _unless_null(drawn: dict[str, Any]) -> dict[str, Any]:
    """A query string has no null: what is not given is left out."""
    (one,) = [member for member in drawn.get("anyOf", [drawn]) if member.get("type") != "null"]
    return {key: value for key, value in one.items() if key != "title"}


def _repeats(schema: type[Query], key: str) -> bool:
    field = schema.model_fields.get(key)
    return field is not None and isinstance(field.default, tuple)


def _with_allowed(error: ApiError, schema: type[Query]) -> ApiError:
    """An unknown parameter is told which ones there are."""
    if error.param in schema.model_fields or (error.param or "").partition(".")[0] in schema.model_fields:
        return error
    allowed = ", ".join(schema.model_fields) or "none"
    return bad_request(f"{error.param}: unknown query parameter; the route takes {allowed}.", error.param)

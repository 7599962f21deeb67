"""One envelope for every error: ``{"error": {"message", "type", "param", "code"}}``, and the map to status codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import Scope

from onebase.adapters import errors as tree

log = structlog.get_logger("onebase.api")

CLIENT_CLOSED = 499
RETRY_SECONDS = 5


class ApiError(Exception):
    """An answer that is not 2xx. ``code`` is for programs, ``message`` for people, ``param`` the field at fault."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code

    @property
    def body(self) -> dict[str, dict[str, str | None]]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        if self.status in {408, 409, 507}:
            return {"x-should-retry": "false"}
        return {"Retry-After": str(RETRY_SECONDS)} if self.status in {429, 503} else {}


GONE = ApiError(CLIENT_CLOSED, "The client is gone.", code="client_closed")


def note_failure(scope: Scope, error: ApiError) -> None:
    """For the metrics of the model that was to answer: see middleware.py."""
    scope["state"]["failure"] = error.code or "bad_request"


def not_ready(message: str) -> ApiError:
    """503: the server cannot serve this now, and may soon."""
    return ApiError(503, message, code="not_ready")


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    code: str


_ANSWERS: Mapping[type[tree.OneBaseError], _Answer] = {
    tree.AdapterTooLarge: _Answer(413, "adapter_too_large"),
    tree.AdapterNameInvalid: _Answer(400, "adapter_name_invalid"),
    tree.AdapterNotFound: _Answer(404, "model_not_found"),
    tree.AdapterConflict: _Answer(409, "adapter_conflict"),
    tree.SourceFailed: _Answer(502, "source_failed"),
    tree.StorageFull: _Answer(507, "insufficient_storage"),
    tree.StorageFailed: _Answer(500, "storage_failed"),
    tree.AdapterError: _Answer(400, "adapter_rejected"),
    tree.EngineDead: _Answer(503, "engine_dead"),
    tree.OutOfMemory: _Answer(503, "out_of_memory"),
    tree.RequestTimedOut: _Answer(408, "timeout"),
    tree.AdapterUnloaded: _Answer(409, "adapter_unloaded"),
    tree.RequestRejected: _Answer(400, "request_rejected"),
    tree.ModelRejected: _Answer(503, "model_rejected"),
    tree.OneBaseError: _Answer(500, "internal_error"),
}


def as_api_error(error: Exception) -> ApiError:
    """What the client is told of any exception; the unforeseen ones are logged and told nothing."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, tree.OneBaseError):
        answer = next(_ANSWERS[kind] for kind in type(error).__mro__ if kind in _ANSWERS)
        return ApiError(answer.status, error.message, param=error.param, code=answer.code)
    log.error("unforeseen error", exc_info=error)
    return ApiError(500, "Internal error; the server's log has the details.", code="internal_error")


def error_response(error: Exception) -> Response:
    known = as_api_error(error)
    return JSONResponse(known.body, known.status, headers=known.headers)


def from_validation(error: ValidationError) -> ApiError:
    """The first thing wrong with a body, named by its path in the JSON (``messages.0.content``)."""
    details = error.errors(include_url=False, include_context=True, include_input=False)
    first = max(details, key=_rank)
    if first["type"] == "json_invalid":
        return bad_request(f"The body is not valid JSON: {first['msg']}", code="invalid_json")
    param = _path(first) or None
    return bad_request(f"{param or 'body'}: {_say(first)}", param)


def _rank(detail: ErrorDetails) -> tuple[bool, int, int]:
    """Of a union's members, the client meant the one of the right type, or the one that got furthest into the value."""
    indices = [part for part in detail["loc"] if isinstance(part, int)]
    return not detail["type"].endswith("_type"), len(indices), sum(indices)


def _path(detail: ErrorDetails) -> str:
    """The place in the JSON, without pydantic's names of a union's members (``list[int]``, ``str``)."""
    *outer, last = loc = _without_tags(detail)
    if loc[0] in _MAPS:
        return ".".join(str(part) for part in loc[:2])[:MAX_PARAM]
    parts = [part for part in outer if isinstance(part, int) or (part.isidentifier() and part not in _UNION_MEMBERS)]
    if (
        detail["type"] == "extra_forbidden"
        or isinstance(last, int)
        or (last.isidentifier() and last not in _UNION_MEMBERS)
    ):
        parts.append(last)
    return ".".join(str(part) for part in parts)[:MAX_PARAM]


def _without_tags(detail: ErrorDetails) -> Sequence[int | str]:
    """The location without the names of tagged members, which follow an index or a field of theirs; a tag that is wrong
    is the field.

    Pydantic names the field, or the function that finds its value: ``type_of()``.
    """
    loc = detail["loc"] or ("",)
    tagged = (before in _TAGGED_FIELDS or (isinstance(before, int) and part in _TAGS) for before, part in pairwise(loc))
    plain = [loc[0], *(part for part, is_tag in zip(loc[1:], tagged, strict=True) if not is_tag)]
    if detail["type"].startswith("union_tag"):
        plain.append(detail["ctx"]["discriminator"].strip("'").removesuffix("_of()"))
    return plain


MAX_PARAM = 200
_MAPS = frozenset({"logit_bias", "metadata", "chat_template_kwargs"})  # with keys of the client's own
_TAGGED_FIELDS = frozenset({"response_format"})
_TAGS = frozenset(
    {
        "system", "developer", "user", "assistant", "tool", "message", "function_call", "function_call_output",
        "input_text", "output_text", "refusal",
    }
)  # fmt: skip
_UNION_MEMBERS = frozenset({"str", "int", "float", "bool"})


def _say(detail: ErrorDetails) -> str:
    match detail["type"]:
        case "extra_forbidden":
            return "unknown field."
        case "missing":
            return "this field is required."
        case "union_tag_not_found":
            return "this field is required, as a text."
        case "union_tag_invalid":
            return f"{detail['ctx']['tag'][:100]!r} is not served; allowed are {detail['ctx']['expected_tags']}."
        case _:
            return detail["msg"].removeprefix("Value error, ").rstrip(".") + "."


def install_handlers(app: FastAPI) -> None:
    async def answer(request: Request, error: Exception) -> Response:
        known = as_api_error(error)
        note_failure(request.scope, known)
        return error_response(known)

    async def http(request: Request, error: Exception) -> Response:
        if not isinstance(error, HTTPException):
            raise error
        response = error_response(_from_http(request, error))
        response.headers.update(error.headers or {})
        return response

    async def gone(request: Request, error: Exception) -> Response:
        note_failure(request.scope, GONE)
        return Response(status_code=CLIENT_CLOSED)

    async def invalid(request: Request, error: Exception) -> Response:
        if not isinstance(error, RequestValidationError):
            raise error
        first = error.errors()[0]
        param = ".".join(str(part) for part in first["loc"][1:]) or None
        return error_response(bad_request(f"{param or first['loc'][0]}: {first['msg']}.", param))

    app.add_exception_handler(ApiError, answer)
    app.add_exception_handler(tree.OneBaseError, answer)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(ClientDisconnect, gone)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(Exception, answer)


def _from_http(request: Request, error: HTTPException) -> ApiError:
    where = f"{request.method} {request.url.path}"
    if error.status_code == 404:
        return ApiError(404, f"No route {where}.", code="not_found")
    if error.status_code == 405:
        return ApiError(405, f"{where} is not allowed here.", code="method_not_allowed")
    return ApiError(error.status_code, str(error.detail))

"""Which answers each route may give: its successes, and its errors by status. The OpenAPI document is made of this."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import BaseModel

from onebase.serve.api import adapter_answer_schemas as adapter_answers
from onebase.serve.api import answer_schemas as answers
from onebase.serve.api.response_answers import ResponseAnswer

PLAIN = "text/plain"
EVENTS = "text/event-stream"
API = frozenset({401})
ADMIN = frozenset({401, 403})
MODEL_WORK = API | {400, 404, 408, 409, 413, 429, 503}  # 409: its adapter was unloaded by force
DISK = frozenset({500, 507})
FETCH = frozenset({502})

MEANINGS: Mapping[int, str] = {
    200: "Done.",
    201: "A version was made.",
    202: "Under way.",
    400: "A field, a parameter or the body is wrong or not supported; `param` names it.",
    401: "The key is missing or wrong.",
    403: "The key does not open this, or the request comes from where it may not.",
    404: "No such model, adapter, version or source.",
    405: "The route has other methods; `Allow` names them.",
    408: "Not done within the request's own timeout; another try is senseless.",
    409: "In conflict with what is there; another try is senseless.",
    413: "The body, or the adapter, is too large.",
    429: "Too much is in flight; try again.",
    500: "A defect, or the disk of the data folder failed.",
    502: "What the adapter is fetched from failed.",
    503: "Not ready, or the engine died; try again.",
    507: "The disk of the data folder is full.",
}


@dataclass(frozen=True, slots=True)
class Route:
    """done: status -> body; a str is a media type without a schema. streams: 200 may be server-sent events too."""

    done: Mapping[int, type[BaseModel] | str]
    errors: frozenset[int] = frozenset()
    streams: bool = False


_ONE = Route({200: adapter_answers.Adapter}, ADMIN | {400, 404, 409, 503} | DISK)

ROUTES: Mapping[str, Route] = {
    "GET /health": Route({200: answers.Status}),
    "GET /ready": Route({200: answers.Status}, frozenset({503})),
    "GET /version": Route({200: answers.Version}),
    "GET /metrics": Route({200: PLAIN}),
    "GET /v1/models": Route({200: answers.Models}, API | {400, 503}),
    "GET /v1/models/{model}": Route({200: answers.Model}, API | {400, 404, 503}),
    "POST /v1/completions": Route({200: answers.Completion}, MODEL_WORK, streams=True),
    "POST /v1/chat/completions": Route({200: answers.ChatCompletion}, MODEL_WORK, streams=True),
    "POST /v1/responses": Route({200: ResponseAnswer}, MODEL_WORK, streams=True),
    "POST /v1/classify": Route({200: answers.Classification}, MODEL_WORK),
    "POST /v1/embeddings": Route({200: answers.Embeddings}, MODEL_WORK),
    "POST /tokenize": Route({200: answers.Tokens}, API | {400, 404, 413, 503}),
    "POST /detokenize": Route({200: answers.Text}, API | {400, 404, 413, 503}),
    "GET /tokenizer_info": Route({200: answers.TokenizerInfo}, API | {400, 404, 503}),
    "GET /v1/adapters": Route({200: adapter_answers.Adapters}, ADMIN | {400, 503}),
    "POST /v1/adapters": Route(
        {201: adapter_answers.Adapter, 202: adapter_answers.Adapter},
        ADMIN | {400, 404, 409, 413, 503} | DISK | FETCH,
    ),
    "GET /v1/adapters/{name}": Route({200: adapter_answers.Adapter}, ADMIN | {400, 404, 503}),
    "GET /v1/adapters/{name}/versions": Route({200: adapter_answers.AdapterVersions}, ADMIN | {400, 404, 503}),
    "PATCH /v1/adapters/{name}": Route(_ONE.done, _ONE.errors | {413}),
    "POST /v1/adapters/{name}/rollback": Route(_ONE.done, _ONE.errors | {413}),
    "DELETE /v1/adapters/{name}": Route({200: adapter_answers.DeletedAdapter}, _ONE.errors),
    "POST /v1/adapters/{name}/load": _ONE,
    "POST /v1/adapters/{name}/unload": Route(
        {200: adapter_answers.UnloadedAdapter, 202: adapter_answers.Adapter}, _ONE.errors
    ),
    "POST /v1/registry/gc": Route({200: adapter_answers.Collected}, ADMIN | {400, 413, 503} | DISK),
    "POST /v1/load_lora_adapter": Route({200: PLAIN}, ADMIN | {400, 404, 413, 503} | DISK | FETCH),
    "POST /v1/unload_lora_adapter": Route({200: PLAIN}, ADMIN | {400, 404, 413, 503} | DISK),
}

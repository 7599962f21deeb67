"""POST /v1/responses: OpenAI's Responses API over the same chat, without a memory of its own."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response
from starlette.types import Scope

from onebase.serve.api.auth import require_api_key
from onebase.serve.api.body import json_body, read_json
from onebase.serve.api.chat import prepare
from onebase.serve.api.errors import ApiError, as_api_error, note_failure
from onebase.serve.api.generation import Job
from onebase.serve.api.query import refuse_unread
from onebase.serve.api.response_events import Event, ResponseWriter
from onebase.serve.api.response_schemas import ResponseRequest, in_our_terms
from onebase.serve.api.stream import EventStream, encode_json, until_disconnect

router = APIRouter(dependencies=[Depends(require_api_key), Depends(refuse_unread)])


@router.post("/v1/responses", openapi_extra=json_body(ResponseRequest))
async def responses(request: Request) -> Response:
    """The answer to a conversation: text, or calls of functions."""
    body = await read_json(request, ResponseRequest)
    try:
        job = await until_disconnect(request.receive, prepare(request, body.for_chat()))
    except ApiError as error:
        raise in_our_terms(error) from error
    headers = {"x-onebase-adapters": job.target.exact}
    writer = ResponseWriter(_shared(request, body, job), job.target.codec.texts)
    events = _events(job, writer, request.state.started)
    if not body.stream:
        last = await until_disconnect(request.receive, _last(events))
        return Response(encode_json(last["response"]), media_type="application/json", headers=headers)
    sent = _sent(events, writer, request.scope)
    first = await until_disconnect(request.receive, anext(sent))
    return EventStream(first, sent, headers)


async def _events(job: Job, writer: ResponseWriter, started: float) -> AsyncGenerator[list[Event], None]:
    """In groups, one for each delta; the first of them once the engine has said something."""
    reason, is_open = "stop", False
    async with aclosing(job.deltas(started)) as deltas:
        async for delta in deltas:
            events = [*([] if is_open else writer.opening()), *writer.write(delta)]
            reason, is_open = delta.finish_reason or reason, True
            if events:
                yield events
    yield writer.closing(reason, job.usage)


async def _last(events: AsyncGenerator[list[Event], None]) -> Event:
    last: Event = {}
    async with aclosing(events):
        async for group in events:
            last = group[-1]
    return last


async def _sent(
    events: AsyncGenerator[list[Event], None], writer: ResponseWriter, scope: Scope
) -> AsyncGenerator[bytes, None]:
    """As bytes. A failure under way is the last event; one before the first event is raised."""
    is_open = False
    async with aclosing(events):
        try:
            async for group in events:
                yield b"".join(map(_bytes, group))
                is_open = True
        except Exception as error:
            if not is_open:
                raise
            known = as_api_error(error)  # too late for a status code
            note_failure(scope, known)
            yield _bytes(writer.failed(known))


def _bytes(event: Event) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (event["type"].encode(), encode_json(event))


def _shared(request: Request, body: ResponseRequest, job: Job) -> dict[str, Any]:
    """The response's fields that stand from the start, most of them the request's own."""
    given = body.model_dump(by_alias=True, include={"tools", "tool_choice"})
    text = None if body.text is None else body.text.format
    return {
        "id": f"resp_{request.state.request_id}",
        "object": "response",
        "created_at": time.time(),
        "model": job.target.label,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "service_tier": "default",
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "text": {"format": text.model_dump(by_alias=True, exclude_none=True) if text else {"type": "text"}},
        "tool_choice": given["tool_choice"] or "auto",
        "tools": given["tools"] or [],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": body.user,
    }

"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from onebase.serve.api.answer import answer
from onebase.serve.api.auth import require_api_key
from onebase.serve.api.body import json_body, read_json
from onebase.serve.api.generation import plan
from onebase.serve.api.resolve import resolve
from onebase.serve.api.schemas import CompletionRequest
from onebase.serve.api.state import Loaded, server_of

DEFAULT_MAX_TOKENS = 16

router = APIRouter(dependencies=[Depends(require_api_key)])


class CompletionShape:
    prefix = "cmpl"
    object = "text_completion"
    chunk_object = "text_completion"

    def choice(self, index: int, text: str, finish_reason: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason}

    def opening(self, index: int) -> None:
        return None

    def text(self, index: int) -> tuple[bytes, bytes]:
        return b'{"index":%d,"text":' % index, b',"logprobs":null,"finish_reason":null}'

    def closing(self, index: int, finish_reason: str) -> dict[str, Any]:
        return self.choice(index, "", finish_reason)


@router.post("/v1/completions", openapi_extra=json_body(CompletionRequest))
async def completions(request: Request) -> Response:
    """Text after a prompt, or after each of several."""
    body = await read_json(request, CompletionRequest)
    server = server_of(request)
    loaded = server.require_ready()
    server.admission.sequences.take(len(body.prompts) * body.choices, request.state.held, "n")
    target = await resolve(loaded.store, server.settings.base_name, body.model, body.adapters, request.state.held)
    prompts = await _tokens(loaded, body.prompts, body.add_special_tokens)
    job = plan(server, loaded, target, body, prompts, DEFAULT_MAX_TOKENS)
    server.admission.tokens.take(job.prompt_tokens, request.state.held, "prompt")
    return await answer(request, job, CompletionShape(), stream=bool(body.stream), usage=body.wants_usage)


async def _tokens(loaded: Loaded, prompts: Sequence[str | list[int]], special: bool) -> list[list[int]]:
    """Prompts given as ids are taken as they are: no token is added to them."""
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    if texts:
        return await loaded.codec.encode(texts, special=special, max_chars=loaded.max_chars)
    return [prompt for prompt in prompts if not isinstance(prompt, str)]

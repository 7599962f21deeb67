"""POST /v1/chat/completions."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from onebase.serve.api.answer import Choice, answer
from onebase.serve.api.auth import require_api_key
from onebase.serve.api.body import json_body, read_json
from onebase.serve.api.chat_schemas import ChatRequest
from onebase.serve.api.generation import plan
from onebase.serve.api.logprobs import chat_logprobs
from onebase.serve.api.query import refuse_unread
from onebase.serve.api.resolve import resolve
from onebase.serve.api.state import server_of
from onebase.serve.api.token_texts import TokenTexts

router = APIRouter(dependencies=[Depends(require_api_key), Depends(refuse_unread)])


class ChatShape:
    prefix = "chatcmpl"
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, texts: TokenTexts) -> None:
        self._texts = texts

    def choice(self, choice: Choice) -> dict[str, Any]:
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        return {
            "index": choice.index,
            "message": message,
            "logprobs": self._logprobs(choice),
            "finish_reason": choice.finish_reason,
        }

    def opening(self, index: int) -> dict[str, Any]:
        return _chunk(index, {"role": "assistant", "content": ""})

    def text(self, index: int) -> tuple[bytes, bytes]:
        return b'{"index":%d,"delta":{"content":' % index, b'},"logprobs":null,"finish_reason":null}'

    def piece(self, choice: Choice) -> dict[str, Any]:
        return _chunk(choice.index, {"content": choice.text}, self._logprobs(choice))

    def closing(self, index: int, finish_reason: str) -> dict[str, Any]:
        return _chunk(index, {}, finish_reason=finish_reason)

    def _logprobs(self, choice: Choice) -> dict[str, Any] | None:
        return chat_logprobs(choice.scores, self._texts) if choice.scores else None


def _chunk(
    index: int, delta: dict[str, str], logprobs: dict[str, Any] | None = None, finish_reason: str | None = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


@router.post("/v1/chat/completions", openapi_extra=json_body(ChatRequest))
async def chat_completions(request: Request) -> Response:
    """The assistant's next turn, through the base model's own chat template."""
    body = await read_json(request, ChatRequest)
    server = server_of(request)
    loaded = server.require_ready()
    server.admission.sequences.take(body.choices, request.state.held, "n")
    target = await resolve(request, loaded, body.model, body.adapters)
    messages = [message.for_template() for message in body.messages]
    prompt = await loaded.codec.encode_chat(messages, max_chars=loaded.max_chars)
    job = plan(server, loaded, target, body, [prompt], None)
    server.admission.tokens.take(job.prompt_tokens, request.state.held, "messages")
    return await answer(request, job, ChatShape(loaded.codec.texts), stream=bool(body.stream), usage=body.wants_usage)

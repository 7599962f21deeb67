"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from onebase.serve.api.answer import Choice, answer
from onebase.serve.api.auth import require_api_key
from onebase.serve.api.body import json_body, read_json
from onebase.serve.api.chat_schemas import ChatRequest
from onebase.serve.api.errors import ApiError, bad_request
from onebase.serve.api.generation import Job, plan
from onebase.serve.api.grammar_checker import GrammarTooSlow
from onebase.serve.api.logprobs import chat_logprobs, prompt_logprobs
from onebase.serve.api.query import refuse_unread
from onebase.serve.api.resolve import resolve
from onebase.serve.api.sampling import checked_grammar, truncated
from onebase.serve.api.state import admission_of, server_of
from onebase.serve.api.stream import until_disconnect
from onebase.serve.api.token_texts import TokenTexts
from onebase.serve.api.tokenizer import TextCodec
from onebase.serve.api.tool_schemas import NamedChoice
from onebase.serve.api.tools.grammars import arguments_grammar
from onebase.serve.api.tools.parser import CallPiece
from onebase.serve.api.tools.use import ToolUse
from onebase.serve.engine.messages import Grammar

router = APIRouter(dependencies=[Depends(require_api_key), Depends(refuse_unread)])


class ChatShape:
    """prompt_width: alternatives to tell of each token of the prompt."""

    prefix = "chatcmpl"
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, texts: TokenTexts, prompt_width: int | None = None) -> None:
        self._texts = texts
        self._prompt_width = prompt_width

    def choice(self, choice: Choice) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
        if choice.calls:
            message |= {"content": choice.text or None, "tool_calls": whole_calls(choice.calls)}
        written = {
            "index": choice.index,
            "message": message,
            "logprobs": self._logprobs(choice),
            "finish_reason": choice.finish_reason,
        }
        if self._prompt_width is not None and choice.prompt:
            written["prompt_logprobs"] = prompt_logprobs(choice.prompt, self._prompt_width, self._texts)
        return written

    def opening(self, index: int) -> dict[str, Any]:
        return _chunk(index, {"role": "assistant", "content": ""})

    def text(self, index: int) -> tuple[bytes, bytes]:
        return b'{"index":%d,"delta":{"content":' % index, b'},"logprobs":null,"finish_reason":null}'

    def piece(self, choice: Choice) -> dict[str, Any]:
        if choice.calls:
            delta: dict[str, Any] = {"tool_calls": [_call_piece(call) for call in choice.calls]}
        else:
            delta = {"content": choice.text}
        return _chunk(choice.index, delta, self._logprobs(choice))

    def closing(self, index: int, finish_reason: str) -> dict[str, Any]:
        return _chunk(index, {}, finish_reason=finish_reason)

    def _logprobs(self, choice: Choice) -> dict[str, Any] | None:
        return chat_logprobs(choice.scores, self._texts) if choice.scores else None


def whole_calls(pieces: Sequence[CallPiece]) -> list[dict[str, Any]]:
    """Calls as a message has them, out of all of their pieces."""
    firsts = [piece for piece in pieces if piece.name]
    arguments = ["".join(piece.arguments for piece in pieces if piece.index == first.index) for first in firsts]
    return [
        {"id": first.id, "type": "function", "function": {"name": first.name, "arguments": text}}
        for first, text in zip(firsts, arguments, strict=True)
    ]


def _call_piece(piece: CallPiece) -> dict[str, Any]:
    if not piece.name:
        return {"index": piece.index, "function": {"arguments": piece.arguments}}
    function = {"name": piece.name, "arguments": piece.arguments}
    return {"index": piece.index, "id": piece.id, "type": "function", "function": function}


def _chunk(
    index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, finish_reason: str | None = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


@router.post("/v1/chat/completions", openapi_extra=json_body(ChatRequest))
async def chat_completions(request: Request) -> Response:
    """The assistant's next turn, through the model's own chat template; it may call tools."""
    body = await read_json(request, ChatRequest)
    job = await until_disconnect(request.receive, prepare(request, body))
    shape = ChatShape(job.target.codec.texts, body.prompt_logprobs)
    return await answer(
        request, job, shape, stream=bool(body.stream), usage=body.wants_usage, running_usage=body.wants_running_usage
    )


async def prepare(request: Request, body: ChatRequest) -> Job:
    """From a checked body to the engine's requests, within what the server takes on."""
    server = server_of(request)
    loaded = server.require_ready()
    admission_of(request).sequences.take(body.choices, request.state.held, "n")
    target = await resolve(request, loaded, body.model, body.adapters)
    tools = tool_use(body, target.codec)
    conversation = body.conversation if tools is None else tools.told(body.conversation)
    grammar = await checked_grammar(server, body, target.tenant)
    whole = await target.codec.encode_chat(conversation, max_chars=loaded.max_chars)
    prompt = truncated(whole, body, loaded, None)
    job = plan(server, loaded, target, body, [prompt], None, grammar=grammar)
    admission_of(request).tokens.take(job.prompt_tokens, request.state.held, "messages")
    request.state.usage = job.usage
    return job if tools is None else await with_tools(job, tools)


def tool_use(body: ChatRequest, codec: TextCodec) -> ToolUse | None:
    """None where the model is told of no tools. Raises ApiError 400."""
    if not body.functions or body.tool_choice == "none":
        return None
    syntax = codec.require_template().syntax
    choice = body.tool_choice
    use = ToolUse(
        syntax,
        body.functions,
        named=choice.function.name if isinstance(choice, NamedChoice) else None,
        forced=choice not in (None, "auto"),
        parallel=body.parallel_tool_calls is not False,
        tokens=codec.token_ids(syntax.markers),
    )
    if use.forced and body.continue_final_message:
        raise bad_request("tool_choice: continue_final_message leaves no room for a call.", "tool_choice")
    return use


async def with_tools(job: Job, tools: ToolUse) -> Job:
    """Its answers held to the grammar of calls, if there is one, and read. Raises ApiError 400."""
    asked = job.requests[0].sampling.grammar
    if asked is not None and asked.kind != "json_schema":
        raise bad_request("structured_outputs: beside tools only JSON is served.", "structured_outputs")
    if (grammar := tools.grammar(None if asked is None else asked.source)) is not None:
        grammar = await _checked_calls(job, grammar, tools)
        sampled = (replace(request.sampling, grammar=grammar) for request in job.requests)
        requests = [replace(one, sampling=sampling) for one, sampling in zip(job.requests, sampled, strict=True)]
        job = replace(job, requests=tuple(requests))
    texts = job.target.codec.texts
    markers = {token: text for text, token in tools.tokens.items() if texts.is_special(token)}
    return replace(job, reader=tools.reader, markers=markers)


async def _checked_calls(job: Job, grammar: Grammar, tools: ToolUse) -> Grammar:
    """Raises ApiError 400, which names the tool whose schema is at fault where one is by itself."""
    checker, tenant = job.server.grammars, job.target.tenant.name
    try:
        return await checker.checked(grammar, "tools", tenant)
    except GrammarTooSlow:  # trying each by itself would take as long again
        raise
    except ApiError:
        for index, function in enumerate(tools.functions):
            if function in tools.callable:
                field = f"tools.{index}.function.parameters"
                alone = arguments_grammar(function)
                await checker.checked(alone, field, tenant, told=f"{field} (of the tool {function.name!r})")
        raise

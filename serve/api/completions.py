"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from onebase.serve.api.answer import Choice, answer
from onebase.serve.api.auth import require_api_key
from onebase.serve.api.body import json_body, read_json
from onebase.serve.api.completion_schemas import CompletionRequest
from onebase.serve.api.generation import Job, plan
from onebase.serve.api.logprobs import LegacyWriter, prompt_logprobs
from onebase.serve.api.query import refuse_unread
from onebase.serve.api.resolve import resolve
from onebase.serve.api.sampling import checked_grammar, truncated
from onebase.serve.api.state import Loaded, Server, admission_of, server_of
from onebase.serve.api.stream import until_disconnect
from onebase.serve.api.token_texts import TokenTexts
from onebase.serve.api.tokenizer import TextCodec
from onebase.serve.api.writing import written

DEFAULT_MAX_TOKENS = 16

router = APIRouter(dependencies=[Depends(require_api_key), Depends(refuse_unread)])


class CompletionShape:
    """Of one request: log-probabilities of streamed pieces count their offsets on."""

    prefix = "cmpl"
    object = "text_completion"
    chunk_object = "text_completion"

    def __init__(self, body: CompletionRequest, texts: TokenTexts, prompts: Sequence[Sequence[int]]) -> None:
        self._body = body
        self._texts = texts
        self._prompts = prompts
        self._writers: dict[int, LegacyWriter] = {}

    def choice(self, choice: Choice) -> dict[str, Any]:
        written = {
            "index": choice.index,
            "text": choice.text,
            "logprobs": self._logprobs(choice),
            "finish_reason": choice.finish_reason,
        }
        width = self._body.prompt_logprobs
        if width is not None and choice.prompt:
            written["prompt_logprobs"] = prompt_logprobs(choice.prompt, width, self._texts)
        return written

    def opening(self, index: int) -> None:
        return None

    def text(self, index: int) -> tuple[bytes, bytes]:
        return b'{"index":%d,"text":' % index, b',"logprobs":null,"finish_reason":null}'

    def piece(self, choice: Choice) -> dict[str, Any]:
        return self.choice(choice)

    def closing(self, index: int, finish_reason: str) -> dict[str, Any]:
        return {"index": index, "text": "", "logprobs": None, "finish_reason": finish_reason}

    def _logprobs(self, choice: Choice) -> dict[str, Any] | None:
        if not choice.scores:
            return None
        if choice.index not in self._writers:
            writer = self._writers[choice.index] = LegacyWriter(
                self._texts, shows_special=self._body.skip_special_tokens is False
            )
            if self._body.echo:
                writer.starts_text(self._prompts[choice.index // self._body.choices])
        return self._writers[choice.index].write(choice.scores)


@router.post("/v1/completions", openapi_extra=json_body(CompletionRequest))
async def completions(request: Request) -> Response:
    """Text after a prompt, or after each of several."""
    body = await read_json(request, CompletionRequest)
    job, prompts = await until_disconnect(request.receive, _prepared(request, body))
    shape = CompletionShape(body, job.target.codec.texts, prompts)
    return await answer(
        request, job, shape, stream=bool(body.stream), usage=body.wants_usage, running_usage=body.wants_running_usage
    )


async def _prepared(request: Request, body: CompletionRequest) -> tuple[Job, list[Sequence[int]]]:
    """The job within what the server takes on, and its prompts' tokens."""
    server = server_of(request)
    loaded = server.require_ready()
    admission_of(request).sequences.take(len(body.prompts) * body.candidates, request.state.held, "n")
    target = await resolve(request, loaded, body.model, body.adapters)
    grammar = await checked_grammar(server, body, target.tenant)
    whole = await encoded(loaded, target.codec, body.prompts, body.add_special_tokens, "prompt")
    prompts = [truncated(prompt, body, loaded, DEFAULT_MAX_TOKENS) for prompt in whole]
    echoes = await _echoes(server, target.codec, body, whole, prompts) if body.echo else []
    job = plan(server, loaded, target, body, prompts, DEFAULT_MAX_TOKENS, echoes, grammar)
    admission_of(request).tokens.take(job.prompt_tokens, request.state.held, "prompt")
    request.state.usage = job.usage
    return job, prompts


async def _echoes(
    server: Server,
    codec: TextCodec,
    body: CompletionRequest,
    whole: Sequence[Sequence[int]],
    prompts: Sequence[Sequence[int]],
) -> list[str]:
    """Prompts as the client wrote them; ids, and what was cut, as answers would have them."""
    skips_special = body.skip_special_tokens is not False

    def write() -> list[str]:
        return [
            given if isinstance(given, str) and len(kept) == len(ids) else codec.texts.shown(kept, skips_special)
            for given, ids, kept in zip(body.prompts, whole, prompts, strict=True)
        ]

    return await written(server, sum(map(len, prompts)), write)


async def encoded(
    loaded: Loaded, codec: TextCodec, prompts: Sequence[str | list[int]], special: bool, param: str
) -> list[list[int]]:
    """Prompts given as ids are taken as they are: no token is added to them. ``param``: the field, for errors."""
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    if texts:
        return await codec.encode(texts, special=special, max_chars=loaded.max_chars, param=param)
    return [prompt for prompt in prompts if not isinstance(prompt, str)]

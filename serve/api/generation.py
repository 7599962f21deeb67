"""From a checked request to text: one engine request per prompt and choice, their deltas merged as they come."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

from onebase.adapters.errors import EngineDead
from onebase.serve.api.best_of import BestOf
from onebase.serve.api.deltas import Delta
from onebase.serve.api.detokenizer import Detokenizer, TextOptions
from onebase.serve.api.errors import bad_request
from onebase.serve.api.generation_schemas import Generation
from onebase.serve.api.resolve import Target
from onebase.serve.api.sampling import sampling_params, seed_of
from onebase.serve.api.state import Loaded, Server
from onebase.serve.api.tenancy import owned
from onebase.serve.api.tools.reader import ToolReader
from onebase.serve.engine.logprobs import TokenLogprob, unpack
from onebase.serve.engine.messages import Grammar, Logprobs, Request, SamplingParams, TokenOutput
from onebase.serve.metrics import RequestTimer

T = TypeVar("T")


@dataclass(slots=True)
class Usage:
    """cached_tokens: of the prompts, given by the prefix cache to the first choice of each."""

    prompt_tokens: int
    completion_tokens: int = 0
    cached_tokens: int = 0

    def as_dict(self) -> dict[str, Any]:
        total = self.prompt_tokens + self.completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": total,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@dataclass(frozen=True, slots=True)
class Job:
    """All sequences of one HTTP request. ``requests[i]`` becomes the choice with index i; each prompt has ``choices``.

    best: which of them are answered; None: all. echoes: the text of each one's prompt, where the answer is to start
    with it. reader: finds the calls of tools in a choice. markers: special tokens that it has to see.
    """

    server: Server
    loaded: Loaded
    target: Target
    requests: tuple[Request, ...]
    options: TextOptions
    usage: Usage
    choices: int = 1
    best: BestOf | None = None
    echoes: tuple[str, ...] = ()
    reader: Callable[[], ToolReader] | None = None
    markers: Mapping[int, str] = field(default_factory=dict)

    @property
    def prompt_tokens(self) -> int:
        """Of all sequences: each choice runs its prompt."""
        return sum(len(request.prompt) for request in self.requests)

    async def deltas(self, started: float) -> AsyncGenerator[Delta, None]:
        """Closing it aborts every sequence. Raises EngineError and AdapterError.

        started: when the request came, on the monotonic clock; latencies count from there.
        """
        timer = RequestTimer(self.server.metrics, self.target.metric, self.usage.prompt_tokens, started)
        stream = self._sequence if self.reader is None else partial(self._read, self.reader)
        streams = [stream(index, request) for index, request in enumerate(self.requests)]
        async with aclosing(merged(streams)) as deltas:
            async for delta in deltas:
                self.usage.completion_tokens += delta.tokens
                timer.tokens(delta.index, delta.tokens)
                yield delta
        timer.finished()

    async def _read(self, make: Callable[[], ToolReader], index: int, request: Request) -> AsyncGenerator[Delta, None]:
        """A sequence, its calls read. It ends early where the reader has all that is wanted."""
        reader = make()
        async with aclosing(self._sequence(index, request)) as deltas:
            async for delta in deltas:
                for part in reader.read(delta):
                    yield part
                    if part.finish_reason is not None:
                        return

    async def _sequence(self, index: int, request: Request) -> AsyncGenerator[Delta, None]:
        ends = {*request.sampling.stop_token_ids, *self.loaded.info.eos_token_ids}
        silent = set() if self.options.includes_stop else ends
        text = Detokenizer(self.target.codec.backend, request.prompt, self.options, self.markers)
        prompt = PromptDelta(request, self.echoes[index] if self.echoes else None)
        async with aclosing(self.server.engine.generate(request)) as outputs:
            async for output in outputs:
                if output.prompt_logprobs is not None:
                    prompt.add(output.prompt_logprobs)
                    continue
                if index % self.choices == 0:
                    self.usage.cached_tokens += output.cached_tokens
                if (first := prompt.take(index)) is not None:
                    yield first
                delta = _delta(index, text, output, silent)
                yield delta
                if delta.finish_reason is not None:
                    return
        raise EngineDead("The engine ended the sequence without a reason.")


class PromptDelta:
    """What a choice says of its prompt, before anything else: its echo and its log-probabilities."""

    def __init__(self, request: Request, echo: str | None) -> None:
        self._request = request
        self._echo = echo
        self._scores = [TokenLogprob(request.prompt[0])]
        self._is_due = echo is not None or request.sampling.prompt_logprobs is not None

    def add(self, logprobs: Logprobs) -> None:
        self._scores.extend(unpack(logprobs))

    def take(self, index: int) -> Delta | None:
        """The delta, the first time; None where there is nothing to say."""
        if not self._is_due:
            return None
        self._is_due = False
        sampling = self._request.sampling
        scores = () if sampling.prompt_logprobs is None else tuple(self._scores)
        if self._echo is None or sampling.logprobs is None:
            return Delta(index, self._echo or "", 0, prompt=scores)
        echoed = tuple(replace(score, top=score.top[: sampling.logprobs]) for score in scores)
        return Delta(index, self._echo, 0, scores=echoed, prompt=scores)


def _delta(index: int, text: Detokenizer, output: TokenOutput, silent: set[int]) -> Delta:
    """The text of a stop token is not part of the answer; the token counts all the same."""
    if output.finish_reason == "abort":
        raise EngineDead("The engine gave the sequence up.")
    scores = () if output.logprobs is None else unpack(output.logprobs)
    shown = output.tokens
    if output.finish_reason == "stop" and shown and shown[-1] in silent:
        shown = shown[:-1]
    parts: list[str] = []
    for count, token in enumerate(shown, start=1):
        piece = text.push(token)
        parts.append(piece.text)
        if piece.stopped:
            return Delta(index, "".join(parts), count, "stop", scores[:count])
    if output.finish_reason is None:
        return Delta(index, "".join(parts), len(output.tokens), None, scores)
    rest = text.finish()
    reason = "stop" if rest.stopped else output.finish_reason
    return Delta(index, "".join(parts) + rest.text, len(output.tokens), reason, scores)


async def merged(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """What all streams say, in order of arrival. The first failure ends them all."""
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for one in only:
                yield one
        return
    queue: asyncio.Queue[T | Exception | None] = asyncio.Queue()
    tasks = [asyncio.create_task(_pump(stream, queue)) for stream in streams]
    try:
        open_streams = len(tasks)
        while open_streams:
            item = await queue.get()
            if item is None:
                open_streams -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(stream: AsyncGenerator[T, None], queue: asyncio.Queue[T | Exception | None]) -> None:
    try:
        async with aclosing(stream):
            async for item in stream:
                queue.put_nowait(item)
        queue.put_nowait(None)
    except Exception as error:  # handed to the consumer, which raises it
        queue.put_nowait(error)


def plan(
    server: Server,
    loaded: Loaded,
    target: Target,
    body: Generation,
    prompts: Sequence[Sequence[int]],
    default: int | None,
    echoes: Sequence[str] = (),
    grammar: Grammar | None = None,
) -> Job:
    """Checks lengths and makes the engine's requests. ``default``: tokens where the body sets no limit; ``echoes``: the
    text of each prompt, where answers are to start with it; ``grammar``: a checked one, that answers have to match."""
    requests: list[Request] = []
    for prompt in prompts:
        limit = _token_limit(loaded, len(prompt), body, default)
        check_ids(prompt, loaded.info.vocab_size, body.prompt_field)
        ids = tuple(prompt)
        for choice in range(body.candidates):
            sampling = sampling_params(body, limit, seed_of(body.seed, choice), loaded.info.vocab_size, grammar)
            requests.append(owned(_request(body, ids, ending(sampling, target.codec.stops), target), target.tenant))
    usage = Usage(sum(len(prompt) for prompt in prompts))
    texts = tuple(echo for echo in echoes for _ in range(body.candidates))
    best = None if body.candidates == body.choices else BestOf(body.choices, tells=body.num_logprobs is not None)
    return Job(server, loaded, target, tuple(requests), text_options(body), usage, body.candidates, best, texts)


def _request(body: Generation, prompt: tuple[int, ...], sampling: SamplingParams, target: Target) -> Request:
    return Request(
        uuid.uuid4().hex,
        prompt,
        sampling,
        target.uses,
        priority=body.priority or 0,
        timeout=body.timeout,
        cache_salt=body.cache_salt or "",
    )


def ending(sampling: SamplingParams, ends: tuple[int, ...]) -> SamplingParams:
    """With tokens of the model's own tokenizer that end answers, as the base's do."""
    if sampling.ignore_eos or not ends:
        return sampling
    return replace(sampling, stop_token_ids=(*sampling.stop_token_ids, *ends))


def text_options(body: Generation) -> TextOptions:
    return TextOptions(
        stops=body.stops,
        includes_stop=bool(body.include_stop_str_in_output),
        skips_special=body.skip_special_tokens is not False,
        min_tokens=body.min_tokens or 0,
    )


def _token_limit(loaded: Loaded, prompt: int, body: Generation, default: int | None) -> int:
    """How many tokens may follow a prompt. Raises ApiError 400 that names both numbers."""
    context, asked, field = loaded.info.max_model_len, body.token_limit, body.prompt_field
    if prompt == 0:
        raise bad_request("The prompt has no tokens: give at least one.", field)
    room = context - prompt
    if room < 1 and asked != 0:
        raise _too_long(field, context, f"the prompt has {prompt}, and one has to be left to generate.")
    if asked is not None and asked > room:
        raise _too_long(field, context, f"the prompt has {prompt}, and max_tokens is {asked}.")
    return min(default or room, room) if asked is None else asked


def check_ids(prompt: Sequence[int], vocab_size: int, param: str) -> None:
    """Raises ApiError 400 on ``param``. The prompt has a token."""
    worst = max(prompt)
    if worst >= vocab_size:
        raise bad_request(f"Token id {worst} is not in the vocabulary: ids are 0 to {vocab_size - 1}.", param)


def _too_long(field: str, context: int, what: str) -> Exception:
    """Begins as OpenAI's message does: clients look for that, and make an exception of their own of it."""
    message = f"This model's maximum context length is {context} tokens: {what}"
    return bad_request(message, field, "context_length_exceeded")

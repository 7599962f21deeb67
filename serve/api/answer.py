"""A job's deltas as one JSON answer or as a stream of chunks. Completions and chat differ only in their Shape."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any, Protocol

from fastapi import Request
from starlette.responses import Response

from onebase.serve.api.deltas import Delta
from onebase.serve.api.generation import Job, Usage
from onebase.serve.api.stream import DONE, EventStream, encode_json, event, until_disconnect
from onebase.serve.api.tools.parser import CallPiece
from onebase.serve.api.writing import written
from onebase.serve.engine.logprobs import TokenLogprob


@dataclass(frozen=True, slots=True)
class Head:
    """The fields that every chunk and answer of one request share."""

    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str

    def as_dict(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": self.object,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.system_fingerprint,
        }


@dataclass(slots=True)
class Choice:
    """What a choice has said, or a piece of it. tokens: how many; scores, prompt and calls: see Delta."""

    index: int
    text: str = ""
    tokens: int = 0
    finish_reason: str | None = None
    scores: tuple[TokenLogprob, ...] = ()
    prompt: tuple[TokenLogprob, ...] = ()
    calls: tuple[CallPiece, ...] = ()

    @classmethod
    def of(cls, deltas: Sequence[Delta]) -> Choice:
        """All of a choice's deltas together; there is at least one."""
        return cls(
            deltas[0].index,
            "".join(delta.text for delta in deltas),
            sum(delta.tokens for delta in deltas),
            deltas[-1].finish_reason,
            tuple(chain.from_iterable(delta.scores for delta in deltas)),
            tuple(chain.from_iterable(delta.prompt for delta in deltas)),
            tuple(chain.from_iterable(delta.calls for delta in deltas)),
        )


class Shape(Protocol):
    """How one endpoint writes the choices of one request. ``prefix``, ``object`` and ``chunk_object`` are its names in
    the protocol."""

    prefix: str
    object: str
    chunk_object: str

    def choice(self, choice: Choice) -> dict[str, Any]:
        """One finished choice of an answer that is not streamed."""

    def opening(self, index: int) -> dict[str, Any] | None:
        """The first chunk's choice, before any text."""

    def text(self, index: int) -> tuple[bytes, bytes]:
        """A chunk's choice as JSON before and after the encoded text: the hot path encodes only the text."""

    def piece(self, choice: Choice) -> dict[str, Any]:
        """A chunk's choice with log-probabilities or calls. The pieces of one choice come in order."""

    def closing(self, index: int, finish_reason: str) -> dict[str, Any]:
        """The last chunk's choice, after all text."""


async def answer(
    request: Request, job: Job, shape: Shape, *, stream: bool, usage: bool, running_usage: bool = False
) -> Response:
    """Runs the job. Errors before the first token have a status code of their own, streamed or not.

    usage: tell it at the end of a stream; running_usage: in every chunk, too.
    """
    headers = {"x-onebase-adapters": job.target.exact}
    if not stream:
        body = await until_disconnect(request.receive, _whole(request, job, shape))
        return Response(body, media_type="application/json", headers=headers)
    head = _head(request, job, shape.prefix, shape.chunk_object)
    writer = _ChunkWriter(shape, head, usage, job.usage if running_usage else None)
    chunks = _chunks(job, writer, head, request.state.started, usage)
    first = await until_disconnect(request.receive, anext(chunks))
    return EventStream(first, chunks, headers)


def _head(request: Request, job: Job, prefix: str, kind: str) -> Head:
    request_id = request.state.request_id
    return Head(f"{prefix}-{request_id}", kind, int(time.time()), job.target.label, job.loaded.fingerprint)


async def _whole(request: Request, job: Job, shape: Shape) -> bytes:
    choices: list[list[Delta]] = [[] for _ in job.requests]
    async with aclosing(job.deltas(request.state.started)) as deltas:
        async for delta in deltas:
            choices[delta.index].append(delta)
    head = _head(request, job, shape.prefix, shape.object)
    whole = [Choice.of(told) for told in choices]
    kept = whole if job.best is None else job.best.pick(whole, job.choices)

    def write() -> bytes:
        done = [shape.choice(choice) for choice in kept]
        return encode_json({**head.as_dict(), "choices": done, "usage": job.usage.as_dict()})

    return await written(job.server, sum(delta.num_values for told in choices for delta in told), write)


async def _chunks(
    job: Job, writer: _ChunkWriter, head: Head, started: float, usage: bool
) -> AsyncGenerator[bytes, None]:
    async with aclosing(job.deltas(started)) as deltas:
        async for delta in deltas:
            data = await written(job.server, delta.num_values, partial(writer.write, delta))
            if data:
                yield data
    if usage:
        yield event({**head.as_dict(), "choices": [], "usage": job.usage.as_dict()})
    yield DONE


class _ChunkWriter:
    """Chunks as bytes. All that does not change between two tokens of a choice is encoded once."""

    def __init__(self, shape: Shape, head: Head, usage: bool, running: Usage | None) -> None:
        """running: told in every chunk, as it is then."""
        self._shape = shape
        self._running = running
        self._before = b"data: " + encode_json(head.as_dict())[:-1] + b',"choices":['
        self._fixed_end = (b'],"usage":null}' if usage else b"]}") + b"\n\n"
        self._text: dict[int, tuple[bytes, bytes]] = {}

    def write(self, delta: Delta) -> bytes:
        """The chunks of a delta: none while its text is held back."""
        parts: list[bytes] = []
        if delta.index not in self._text:
            if not delta.text and delta.finish_reason is None and delta.is_plain:
                return b""
            parts.append(self._open(delta.index))
        if not delta.is_plain:
            parts.append(self._chunk(self._shape.piece(Choice.of([replace(delta, finish_reason=None)]))))
        elif delta.text:
            before, after = self._text[delta.index]
            parts.append(before + encode_json(delta.text) + after + self._end())
        if delta.finish_reason is not None:
            parts.append(self._chunk(self._shape.closing(delta.index, delta.finish_reason)))
        return b"".join(parts)

    def _open(self, index: int) -> bytes:
        before, after = self._shape.text(index)
        self._text[index] = (self._before + before, after)
        opening = self._shape.opening(index)
        return b"" if opening is None else self._chunk(opening)

    def _chunk(self, choice: dict[str, Any]) -> bytes:
        return self._before + encode_json(choice) + self._end()

    def _end(self) -> bytes:
        if self._running is None:
            return self._fixed_end
        return b'],"usage":' + encode_json(self._running.as_dict()) + b"}\n\n"

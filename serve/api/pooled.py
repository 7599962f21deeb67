"""Requests that are answered with numbers and no text: the checks of their inputs, and what the engine says of them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from onebase.adapters.errors import EngineDead
from onebase.serve.api.errors import bad_request
from onebase.serve.api.generation import check_ids, merged
from onebase.serve.api.state import Loaded, Server
from onebase.serve.engine.messages import Request, TokenOutput

MAX_VALUES = 1 << 21  # of one answer: about 40 MB of JSON


def check_inputs(prompts: Sequence[Sequence[int]], loaded: Loaded) -> None:
    """Raises ApiError 400 on ``input``."""
    context = loaded.info.max_model_len
    for prompt in prompts:
        if not prompt:
            raise bad_request("The input has no tokens: give at least one.", "input")
        if len(prompt) > context:
            message = f"The input has {len(prompt)} tokens; the context is {context}."
            raise bad_request(message, "input", "context_length_exceeded")
        check_ids(prompt, loaded.info.vocab_size, "input")


def outputs_of(server: Server, requests: Sequence[Request]) -> AsyncGenerator[tuple[int, TokenOutput], None]:
    """What is said of all requests, with their indices; the first failure, or closing it, ends them all."""
    return merged([_sequence(server, at, request) for at, request in enumerate(requests)])


async def _sequence(server: Server, index: int, request: Request) -> AsyncGenerator[tuple[int, TokenOutput], None]:
    async with aclosing(server.engine.generate(request)) as outputs:
        async for output in outputs:
            if output.finish_reason == "abort":
                raise EngineDead("The engine gave the sequence up.")
            yield index, output
            if output.finish_reason is not None:
                return
    raise EngineDead("The engine ended the sequence without a reason.")

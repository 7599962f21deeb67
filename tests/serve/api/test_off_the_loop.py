"""What takes long happens in threads, and in ways that let go of the interpreter: the event loop turns meanwhile."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from onebase.serve.api.body import LONG_BODY
from onebase.serve.api.completion_schemas import CompletionRequest

LONG = "hello world, the quick brown fox " * 4000


async def _turns(work: Any) -> tuple[Any, int]:
    """The result of ``work``, and how often the loop turned while it ran."""
    task, turns = asyncio.ensure_future(work), 0
    while not task.done():
        await asyncio.sleep(0.001)
        turns += 1
    return task.result(), turns


def test_the_loop_turns_while_long_text_is_encoded_and_decoded(run: Any, open_site: Any) -> None:
    """With the interpreter held it turns once or twice, however fast the machine."""

    async def body() -> None:
        async with open_site() as site:
            codec = site.server.loaded.codec
            text = LONG * 8
            (tokens,), turns = await _turns(codec.encode([text], special=False, max_chars=len(text)))
            assert turns > 10
            assert tokens == list(codec.backend.encode(text, add_special_tokens=False).ids)
            decoded, turns = await _turns(codec.decode_any(tokens * 4))
            assert turns > 5
            assert decoded == text * 4

    run(body())


def _where(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[bool]:
    """Whether each call of a function is made in the event loop's thread."""
    seen: list[bool] = []
    original: Callable[..., Any] = getattr(owner, name)

    def noting(*args: Any, **options: Any) -> Any:
        seen.append(threading.current_thread() is threading.main_thread())
        return original(*args, **options)

    monkeypatch.setattr(owner, name, noting)
    return seen


def test_long_bodies_are_parsed_and_long_answers_written_in_threads(
    run: Any, open_site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body() -> None:
        async with open_site() as site:
            parsed = _where(monkeypatch, CompletionRequest, "model_validate_json")
            for length in (10, LONG_BODY):
                await site.complete(prompt="x" * length)
            assert parsed == [True, False]
            texts = _where(monkeypatch, type(site.server.loaded.codec), "token_texts")
            for prompt in ("hello", LONG * 2):
                response = await site.post("/tokenize", prompt=prompt, return_token_strs=True)
                assert response.status_code == 200
            assert texts == [True, False]

    run(body())


def test_long_answers_of_generations_are_written_in_threads(
    run: Any, open_site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onebase.serve.api.completions import CompletionShape

    async def body() -> None:
        async with open_site() as site:
            written = _where(monkeypatch, CompletionShape, "choice")
            await site.complete(max_tokens=5)
            monkeypatch.setattr("onebase.serve.api.writing.LONG_ANSWER", 4)
            await site.complete(max_tokens=5)
            assert written == [True, False]

    run(body())

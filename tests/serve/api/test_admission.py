"""The server takes on so much and no more; what a request has reserved comes back however the request ends."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import Any

import pytest

from onebase.adapters.errors import EngineDead, RequestRejected
from onebase.serve.api.admission import Budget
from onebase.serve.api.errors import ApiError


def test_a_budget_counts_to_its_limit_and_back(run: Any) -> None:
    async def body() -> None:
        budget = Budget("things", "--things", 3)
        async with AsyncExitStack() as one, AsyncExitStack() as other:
            budget.take(2, one, "n")
            with pytest.raises(ApiError) as full:
                budget.take(2, other, "n")
            assert (full.value.status, full.value.code, budget.taken) == (429, "overloaded", 2)
            with pytest.raises(ApiError) as never:
                budget.take(4, other, "n")
            assert (never.value.status, never.value.param, budget.taken) == (400, "n", 2)
            budget.take(1, other, "n")
            assert budget.taken == 3
        assert budget.taken == 0

    run(body())


def taken(site: Any) -> tuple[int, int]:
    admission = site.server.admission
    return admission.sequences.taken, admission.tokens.taken


async def until_started(site: Any, count: int) -> None:
    while len(site.engine.requests) < count:
        await asyncio.sleep(0.001)


@pytest.mark.parametrize("stream", [False, True])
def test_over_the_limit_of_sequences_is_429_before_anything_is_tokenised(
    run: Any, open_site: Any, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    async def body() -> None:
        async with open_site(max_num_seqs=2, max_inflight_seqs=5) as site:
            site.engine.pause = asyncio.Event()
            first = asyncio.create_task(site.complete(prompt=["x", "y"], n=2, stream=stream, max_tokens=1))
            await until_started(site, 4)
            assert taken(site)[0] == 4
            monkeypatch.setattr(site.server.loaded.codec, "_encode", None)
            for response in (await site.complete(n=2), await site.chat(n=2), await site.complete(prompt=["x"] * 2)):
                assert response.status_code == 429, response.text
                assert int(response.headers["retry-after"]) > 0
                assert response.json()["error"]["code"] == "overloaded"
                assert "--max-inflight-seqs" in response.json()["error"]["message"]
            response = await site.complete(n=6)
            assert (response.status_code, response.json()["error"]["param"]) == (400, "n")
            monkeypatch.undo()
            second = asyncio.create_task(site.chat(max_tokens=1))
            await until_started(site, 5)
            site.engine.pause.set()
            assert [(await call).status_code for call in (first, second)] == [200, 200]
            assert taken(site) == (0, 0)

    run(body())


def test_over_the_limit_of_prompt_tokens_is_429(run: Any, open_site: Any) -> None:
    async def body() -> None:
        async with open_site(max_inflight_tokens=10) as site:
            site.engine.pause = asyncio.Event()
            first = asyncio.create_task(site.complete(prompt=[65, 66, 67], n=3, max_tokens=1))
            await until_started(site, 3)
            assert taken(site) == (3, 9)
            response = await site.complete(prompt=[65, 66])
            assert response.status_code == 429, response.text
            assert "--max-inflight-tokens" in response.json()["error"]["message"]
            for answer, param in (
                (await site.complete(prompt=[65] * 11), "prompt"),
                (await site.chat(n=9), "messages"),
            ):
                assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
            assert taken(site) == (3, 9)
            site.engine.pause.set()
            assert (await first).status_code == 200
            assert (await site.complete(prompt=[65] * 10, max_tokens=1)).status_code == 200

    run(body())


@pytest.mark.parametrize("stream", [False, True])
def test_every_end_gives_back_what_was_reserved(run: Any, open_site: Any, stream: bool) -> None:
    async def body() -> None:
        async with open_site() as site:
            for failure in (EngineDead("gone"), RequestRejected("no"), ZeroDivisionError("bug")):
                site.engine.failure = failure
                assert (await site.complete(stream=stream, n=3)).status_code in {400, 500, 503}
                assert taken(site) == (0, 0)
            site.engine.failure = None
            for options in ({"prompt": "x" * 900}, {"prompt": [999]}, {"model": "nope"}, {"adapters": [{"name": "n"}]}):
                assert (await site.complete(stream=stream, **options)).status_code in {400, 404}
                assert taken(site) == (0, 0)
            site.engine.die_after = 2
            await site.complete(stream=stream, n=2, max_tokens=9)
            assert taken(site) == (0, 0)

    run(body())

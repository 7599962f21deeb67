"""--deterministic through HTTP: the same answer, to the last bit of its log-probabilities, on a busy server."""

from __future__ import annotations

import asyncio
from typing import Any


def test_a_busy_server_gives_the_same_bits(run: Any, open_real: Any) -> None:
    async def body() -> None:
        async with open_real(deterministic=True, max_batch_tokens=24) as site:
            texts = ["hello world, " * n + "the quick" for n in range(1, 6)]
            asked = [{"prompt": text, "max_tokens": 5, "seed": at, "logprobs": 5} for at, text in enumerate(texts)]
            alone = [(await site.complete(**one, echo=True)).json()["choices"] for one in asked]
            together = await asyncio.gather(*(site.complete(**one, echo=True) for one in asked))
            assert [response.json()["choices"] for response in together] == alone
            streams = await asyncio.gather(*(site.complete(**one, stream=True) for one in asked))
            assert all(response.status_code == 200 for response in streams)

    run(body())

"""Fields of completions and chat: what reaches the engine, what they do to text, and that streams say the same."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from onebase.serve.engine.messages import Logprobs, Request, TokenOutput

from .test_completions import events

GIVEN = {
    "logit_bias": {"5": -100, "17": 2.5},
    "presence_penalty": -2,
    "frequency_penalty": 1.5,
    "repetition_penalty": 1.1,
    "min_tokens": 2,
    "stop_token_ids": [7],
    "ignore_eos": True,
    "priority": -3,
    "timeout": 12.5,
    "cache_salt": "salt",
}
NEUTRAL = {
    "logit_bias": {},
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "repetition_penalty": 1,
    "min_tokens": 0,
    "include_stop_str_in_output": False,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "use_beam_search": False,
    "length_penalty": 1.0,
    "service_tier": "auto",
    "store": False,
    "prompt_cache_key": "k",
    "safety_identifier": "s",
    "user": "u",
    "metadata": {"a": "b"},
}


def test_fields_reach_the_engine_from_both_routes(run: Any, open_site: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            for send in (site.complete, site.chat):
                assert (await send(**GIVEN, max_tokens=4)).status_code == 200
                request: Request = site.engine.requests[-1]
                sampling = request.sampling
                assert sampling.logit_bias == ((5, -100.0), (17, 2.5))
                penalties = (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty)
                assert penalties == (-2.0, 1.5, 1.1)
                assert (sampling.min_tokens, sampling.stop_token_ids, sampling.ignore_eos) == (2, (7,), True)
                assert (request.priority, request.timeout, request.cache_salt) == (-3, 12.5, "salt")

    run(body())


@pytest.mark.parametrize("given", [NEUTRAL, dict.fromkeys([*GIVEN, *NEUTRAL], None) | {"ignore_eos": False}])
def test_neutral_values_change_nothing(run: Any, open_site: Any, given: dict[str, Any]) -> None:
    async def body() -> None:
        async with open_site() as site:
            for send in (site.complete, site.chat):
                plain = (await send(seed=1, max_tokens=4)).json()
                same = (await send(**given, seed=1, max_tokens=4)).json()
                assert same["choices"] == plain["choices"]
                first, second = site.engine.requests[-2:]
                assert first.sampling == second.sampling
                assert (second.priority, second.timeout, second.cache_salt) == (0, None, "")

    run(body())


def _scored(logprobs: dict[int, float], tokens: dict[int, list[int]]) -> Any:
    """A reply by seed: these tokens, each with this log-probability."""

    def reply(request: Request) -> list[TokenOutput]:
        seed = request.sampling.seed
        said = tokens[seed]
        arrays = [np.array([token], np.int32).tobytes() for token in said]
        chosen, rank = np.array([logprobs[seed]], np.float32).tobytes(), np.array([1], np.int32).tobytes()
        scores = [Logprobs(0, token, chosen, rank, b"", b"") for token in arrays]
        last = len(said) - 1
        return [
            TokenOutput(request.id, (token,), "length" if at == last else None, scores[at])
            for at, token in enumerate(said)
        ]

    return reply


def test_best_of_answers_the_likeliest_by_their_mean(run: Any, open_site: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            words = {seed: site.encode(text) for seed, text in enumerate(["hello", " quick fox", " brown", "there"])}
            site.engine.reply = _scored({0: -3.0, 1: -0.5, 2: -1.0, 3: -9.0}, words)
            asked = {"best_of": 4, "n": 2, "seed": 0, "max_tokens": 9}
            answer = (await site.complete(**asked)).json()
            assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == [
                (0, " quick fox"),
                (1, " brown"),
            ]
            assert [choice["logprobs"] for choice in answer["choices"]] == [None, None]
            assert answer["usage"]["completion_tokens"] == sum(map(len, words.values()))
            told = (await site.complete(**asked, logprobs=0)).json()["choices"]
            assert told[1]["logprobs"]["token_logprobs"] == [-1.0] * len(words[2])
            response = await site.complete(**asked, stream=True)
            assert (response.status_code, response.json()["error"]["param"]) == (400, "best_of")

    run(body())


async def _both(site: Any, **options: Any) -> tuple[str, str]:
    """(text, finish_reason), after comparing the stream with the whole."""
    whole = (await site.complete(**options)).json()["choices"][0]
    streamed = events((await site.complete(**options, stream=True)).text)
    pieces = [event["choices"][0] for event in streamed[:-1]]
    assert "".join(piece["text"] for piece in pieces) == whole["text"]
    assert pieces[-1]["finish_reason"] == whole["finish_reason"]
    return whole["text"], whole["finish_reason"]


def test_stop_strings_over_token_borders(run: Any, open_site: Any, replies: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            site.engine.reply = replies(site.encode("hello world, hello there"), "length")
            assert await _both(site, stop="world, h") == ("hello ", "stop")
            assert await _both(site, stop="world, h", include_stop_str_in_output=True) == ("hello world, h", "stop")
            assert await _both(site, stop=["hello"], include_stop_str_in_output=True) == ("hello", "stop")
            first = len(site.encode("hello world,"))
            assert await _both(site, stop="hello", min_tokens=first) == ("hello world, ", "stop")

    run(body())


def test_tokens_that_end_it_are_text_only_where_asked(run: Any, open_site: Any, replies: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            hello, there = site.encode("hello"), site.encode(" there")
            site.engine.reply = replies([*hello, *there], "stop")
            stops = {"stop_token_ids": [there[-1]]}
            kept = site.server.loaded.codec.decode([*hello, *there[:-1]])
            assert await _both(site, **stops) == (kept, "stop")
            assert await _both(site, **stops, include_stop_str_in_output=True) == ("hello there", "stop")

    run(body())


def test_special_tokens_are_shown_where_asked(run: Any, open_site: Any, replies: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            site.engine.reply = replies([*site.encode("hello"), 0, *site.encode("fox"), 1], "length")
            assert await _both(site) == ("hellofox", "length")
            assert await _both(site, skip_special_tokens=False) == ("hello<s>fox</s>", "length")
            assert await _both(site, skip_special_tokens=False, stop="<s>f") == ("hello", "stop")
            echoed = (await site.complete(prompt=[0, *site.encode("hi")], echo=True, skip_special_tokens=False)).json()
            assert echoed["choices"][0]["text"].startswith("<s>hi")

    run(body())


def test_prompts_are_cut_from_the_left(run: Any, open_site: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            prompt = list(range(2, 252))
            for keep, wanted in ((3, prompt[-3:]), (250, prompt), (1000, prompt), (-1, prompt[-236:])):
                await site.complete(prompt=prompt, truncate_prompt_tokens=keep, max_tokens=1 if keep > 0 else 20)
                assert list(site.engine.requests[-1].prompt) == wanted
            response = await site.complete(prompt=prompt, max_tokens=20)
            error = response.json()["error"]
            assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")
            message = {"role": "user", "content": "x" * 300}
            error = (await site.chat(messages=[message])).json()["error"]
            assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
            error = (await site.post("/v1/responses", model="base", input="x" * 300)).json()["error"]
            assert (error["code"], error["param"]) == ("context_length_exceeded", "input")
            echoed = (
                await site.complete(prompt="hello world", truncate_prompt_tokens=1, echo=True, max_tokens=1)
            ).json()
            last = site.server.loaded.codec.decode(site.encode("hello world")[-1:])
            assert echoed["choices"][0]["text"].startswith(last)
            assert not echoed["choices"][0]["text"].startswith("hello")
            await site.chat(truncate_prompt_tokens=2, max_tokens=1)
            assert len(site.engine.requests[-1].prompt) == 2

    run(body())


def test_usage_is_told_in_every_chunk_where_asked(run: Any, open_site: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            options = {"include_usage": True, "continuous_usage_stats": True}
            for send in (site.complete, site.chat):
                *told, last, done = events((await send(stream=True, stream_options=options, max_tokens=5)).text)
                counts = [event["usage"]["completion_tokens"] for event in told]
                assert done == "[DONE]"
                assert counts == sorted(counts)
                assert counts[-1] == last["usage"]["completion_tokens"] == 5
                assert last["choices"] == []
                assert told[0]["usage"]["prompt_tokens"] == last["usage"]["prompt_tokens"]
            bad = await site.complete(stream=True, stream_options={"continuous_usage_stats": True})
            assert bad.json()["error"]["param"] == "stream_options.continuous_usage_stats"

    run(body())


def test_what_is_not_served_says_so(run: Any, open_site: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            for field, value in (("suffix", "x"), ("use_beam_search", True), ("service_tier", "flex"), ("store", True)):
                response = await site.complete(**{field: value})
                assert response.status_code == 400
                assert json.loads(response.text)["error"]["code"] == "unsupported_field"

    run(body())

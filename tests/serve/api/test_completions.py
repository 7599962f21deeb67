"""POST /v1/completions and /v1/chat/completions against a fake engine: shapes, streaming, limits, sampling."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from onebase.serve.engine.messages import TokenOutput


def events(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def test_completion_has_the_openai_shape(run: Any, open_site: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            response = await site.complete(prompt="hello world", max_tokens=4)
            answer = response.json()
            assert response.status_code == 200, answer
            assert answer["object"] == "text_completion"
            assert answer["model"] == "base"
            assert answer["id"].startswith("cmpl-")
            (choice,) = answer["choices"]
            prompt = site.encode("hello world")
            expected = site.server.loaded.codec.decode([prompt[i % len(prompt)] for i in range(4)])
            assert choice == {"index": 0, "text": expected, "logprobs": None, "finish_reason": "length"}
            assert answer["usage"] == {
                "prompt_tokens": len(prompt),
                "completion_tokens": 4,
                "total_tokens": len(prompt) + 4,
                "prompt_tokens_details": {"cached_tokens": 0},
            }

    run(body())


def test_chat_renders_the_template_and_uses_the_rest_of_the_context(run: Any, open_site: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            messages = [
                {"role": "developer", "content": "be kind"},
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            ]
            answer = (await site.chat(messages=messages)).json()
            request = site.engine.requests[0]
            rendered = "system: be kind\nuser: a\nb\nassistant:"
            assert site.server.loaded.codec.decode(request.prompt) == rendered
            assert request.sampling.max_tokens == 256 - len(request.prompt)
            assert answer["object"] == "chat.completion"
            assert answer["choices"][0]["message"]["role"] == "assistant"

    run(body())


def test_streamed_text_equals_the_whole_text(run: Any, open_site: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            options = {"prompt": "héllo 😀 wörld", "max_tokens": 30}
            whole = (await site.complete(**options)).json()
            response = await site.complete(stream=True, stream_options={"include_usage": True}, **options)
            assert response.headers["content-type"].startswith("text/event-stream")
            *chunks, usage, done = events(response.text)
            assert done == "[DONE]"
            assert usage["choices"] == []
            assert usage["usage"] == whole["usage"]
            assert all(chunk["usage"] is None for chunk in chunks)
            assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["choices"][0]["text"]
            reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
            assert reasons == [None] * (len(chunks) - 1) + ["length"]

    run(body())


def test_chat_stream_starts_with_the_role_and_ends_with_an_empty_delta(run: Any, open_site: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            response = await site.chat(stream=True, max_completion_tokens=3, n=2)
            *chunks, done = events(response.text)
            assert done == "[DONE]"
            for index in (0, 1):
                deltas = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
                assert deltas[0]["delta"] == {"role": "assistant", "content": ""}
                assert deltas[-1]["delta"] == {}
                assert deltas[-1]["finish_reason"] == "length"
                assert all("usage" not in chunk for chunk in chunks)

    run(body())


def test_several_prompts_and_n_are_indexed_in_order(run: Any, open_site: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            answer = (await site.complete(prompt=["x", "y", [90, 91]], n=2, max_tokens=2)).json()
            assert answer["error"]["param"].startswith("prompt")
            answer = (await site.complete(prompt=["x", "y"], n=2, max_tokens=2)).json()
            assert [c["index"] for c in answer["choices"]] == [0, 1, 2, 3]
            assert [c["text"] for c in answer["choices"]] == ["xx", "xx", "yy", "yy"]
            assert answer["usage"]["prompt_tokens"] == 2
            assert answer["usage"]["completion_tokens"] == 8

    run(body())


def test_ids_are_taken_as_they_are(run: Any, open_site: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            await site.complete(prompt=[90, 91, 92], max_tokens=1)
            await site.complete(prompt=[[90], [91, 92]], max_tokens=1)
            assert sorted(r.prompt for r in site.engine.requests) == [(90,), (90, 91, 92), (91, 92)]

    run(body())


def test_usage_tells_what_the_prefix_cache_gave(run: Any, open_site: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            site.engine.reply = lambda request: [TokenOutput(request.id, (90,), "length", cached_tokens=32)]
            answer = (await site.complete(prompt=["x", "y"], n=2, max_tokens=1)).json()
            assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 64}

    run(body())


def test_sampling_reaches_the_engine(run: Any, open_site: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            options = {"temperature": 0.5, "top_p": 0.9, "top_k": -1, "min_p": 0.1, "seed": -1, "n": 2}
            await site.complete(**options, stop_token_ids=[7], ignore_eos=True)
            first, second = (r.sampling for r in sorted(site.engine.requests, key=lambda r: r.sampling.seed))
            assert (first.temperature, first.top_p, first.top_k, first.min_p) == (0.5, 0.9, 0, 0.1)
            assert (first.stop_token_ids, first.ignore_eos, first.max_tokens) == ((7,), True, 16)
            assert {first.seed, second.seed} == {0, (1 << 63) - 1}

    run(body())


def test_seeds_differ_between_requests_and_repeat_when_given(run: Any, open_site: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            for options in ({}, {}, {"seed": 5}, {"seed": 5}):
                await site.complete(max_tokens=1, **options)
            a, b, c, d = (r.sampling.seed for r in site.engine.requests)
            assert a != b
            assert c == d == 5

    run(body())


def test_equal_prompts_of_one_request_draw_apart_unless_seeded(run: Any, open_site: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            await site.complete(prompt=["x", "x", "x"], n=2, max_tokens=1)
            assert len({r.sampling.seed for r in site.engine.requests}) == 6
            site.engine.requests.clear()
            await site.complete(prompt=["x", "x"], n=2, seed=7, max_tokens=1)
            assert sorted(r.sampling.seed for r in site.engine.requests) == [7, 7, 8, 8]

    run(body())


def test_stop_string_across_tokens_is_not_returned_and_aborts(run: Any, open_site: Any, replies: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            site.engine.reply = replies(site.encode("abc STOP never"), "length")
            for stream in (False, True):
                response = await site.complete(stop=["c ST"], max_tokens=50, stream=stream)
                if stream:
                    chunks = [c["choices"][0] for c in events(response.text)[:-1]]
                    text, reason = "".join(c["text"] for c in chunks), chunks[-1]["finish_reason"]
                else:
                    text, reason = (response.json()["choices"][0][key] for key in ("text", "finish_reason"))
                assert (text, reason) == ("ab", "stop")
            assert len(site.engine.aborted) == 2

    run(body())


def test_the_text_of_a_stop_token_is_left_out_but_counted(run: Any, open_site: Any, replies: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            word, stop = site.encode("x")[0], site.encode("y")[0]
            site.engine.reply = replies([word, stop], "stop")
            answer = (await site.complete(stop_token_ids=[stop])).json()
            assert answer["choices"][0]["text"] == "x"
            assert answer["usage"]["completion_tokens"] == 2

    run(body())


@pytest.mark.parametrize(
    ("options", "numbers"),
    [
        ({"prompt": [65] * 256}, ("256",)),
        ({"prompt": [65] * 200, "max_tokens": 57}, ("200", "57", "256")),
        ({"prompt": "x" * 100_000}, ("prompt", "100000", "8192")),
        ({"prompt": [300]}, ("300", "299")),
        ({"prompt": ""}, ("one",)),
        ({"prompt": []}, ()),
        ({"prompt": [[]]}, ("one",)),
    ],
)
def test_prompts_that_do_not_fit_are_400_and_say_why(
    run: Any, open_site: Any, options: dict[str, Any], numbers: tuple[str, ...]
) -> None:
    async def body() -> None:
        async with open_site() as site:
            response = await site.complete(**options)
            assert response.status_code == 400
            for number in numbers:
                assert number in response.json()["error"]["message"]
            assert not site.engine.requests

    run(body())


def test_default_max_tokens_fits_the_room(run: Any, open_site: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            await site.complete(prompt=[65] * 250)
            assert site.engine.requests[0].sampling.max_tokens == 6

    run(body())


def test_inert_labels_and_neutral_defaults_are_accepted(run: Any, open_site: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            neutral = {"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "user": "u", "metadata": {}}
            response = await site.complete(**neutral, best_of=1, echo=False, logprobs=None, suffix=None, stop=None)
            assert response.status_code == 200, response.text
            chat = {"logprobs": False, "response_format": {"type": "text"}, "tools": [], "tool_choice": "none"}
            response = await site.chat(**neutral, **chat, max_tokens=2)
            assert response.status_code == 200, response.text

    run(body())


def test_template_errors_and_missing_templates_are_400(
    run: Any, settings_for: Any, open_site: Any, bare_model_folder: Any
) -> None:
    async def body() -> None:
        async with open_site() as site:
            response = await site.chat(messages=[{"role": "user", "content": "boom"}])
            assert response.status_code == 400
            assert "no boom" in response.json()["error"]["message"]
        async with open_site(model=str(bare_model_folder)) as site:
            response = await site.chat()
            assert response.status_code == 400
            assert "chat template" in response.json()["error"]["message"]

    run(body())


def test_request_id_is_echoed_when_sane_and_never_keys_the_engine(run: Any, open_site: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            for given, kept in (("mine-1", True), ("x" * 129, False), ("a b", False)):
                json_body = {"model": "base", "prompt": "x", "max_tokens": 1}
                response = await site.http.post("/v1/completions", json=json_body, headers={"x-request-id": given})
                assert (response.headers["x-request-id"] == given) is kept
                assert response.json()["id"] == f"cmpl-{response.headers['x-request-id']}"
            assert "mine-1" not in {request.id for request in site.engine.requests}

    run(body())


def test_concurrent_requests_do_not_mix(run: Any, open_site: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            site.engine.delay = 0.001
            letters = "abcdefghijklmnop"
            calls = [site.complete(prompt=letter, max_tokens=5, stream=i % 2 == 0) for i, letter in enumerate(letters)]
            for letter, i, response in zip(letters, range(16), await asyncio.gather(*calls), strict=True):
                if i % 2:
                    assert response.json()["choices"][0]["text"] == letter * 5
                else:
                    chunks = events(response.text)[:-1]
                    assert "".join(c["choices"][0]["text"] for c in chunks) == letter * 5

    run(body())

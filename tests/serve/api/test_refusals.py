"""Bad requests: always 400 in the envelope, with the field's name, before the engine hears of it."""

from __future__ import annotations

import json
import threading
from typing import Any

import httpx
import pytest

from onebase.serve.api.completion_schemas import CompletionRequest

COMPLETION_CASES: list[tuple[dict[str, Any], str]] = [
    ({"model": 5}, "model"),
    ({"model": ""}, "model"),
    ({"model": "x" * 300}, "model"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt.1"),
    ({"prompt": [True]}, "prompt.0"),
    ({"prompt": [1.5]}, "prompt.0"),
    ({"prompt": [-1]}, "prompt.0"),
    ({"prompt": [[1], ["a"]]}, "prompt.1.0"),
    ({"prompt": ["x"] * 2049}, "prompt"),
    ({"prompt": ["x"] * 1024, "n": 2}, "n"),
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"n": "2"}, "n"),
    ({"n": True}, "n"),
    ({"n": 1e99}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -5}, "max_tokens"),
    ({"max_tokens": 10**30}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"seed": 1 << 63}, "seed"),
    ({"seed": "1"}, "seed"),
    ({"stop": [""]}, "stop.0"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": "a" * 1001}, "stop"),
    ({"stop": [1]}, "stop.0"),
    ({"stop": {}}, "stop"),
    ({"stop_token_ids": [-1]}, "stop_token_ids.0"),
    ({"stop_token_ids": list(range(129))}, "stop_token_ids"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"nope": 1}}, "stream_options.nope"),
    ({"stream": True, "stream_options": []}, "stream_options"),
    ({"ignore_eos": 1}, "ignore_eos"),
    ({"adapters": {}}, "adapters"),
    ({"adapters": [{"name": "a", "scale": "1"}]}, "adapters.0.scale"),
    ({"adapters": [{"name": "a", "scale": 1e9}]}, "adapters.0.scale"),
    ({"adapters": [{"scale": 1}]}, "adapters.0.name"),
    ({"adapters": [{"name": "a"}] * 17}, "adapters"),
    ({"user": 5}, "user"),
    ({"metadata": {"a": 1}}, "metadata.a"),
    ({"suffix": "tail"}, "suffix"),
    ({"echo": 1}, "echo"),
    ({"logprobs": -1}, "logprobs"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"prompt_logprobs": 21}, "prompt_logprobs"),
    ({"prompt_logprobs": "1"}, "prompt_logprobs"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 0, "logprobs": 1}, "max_tokens"),
    ({"max_tokens": -1, "echo": True}, "max_tokens"),
    ({"top_logprobs": 1}, "top_logprobs"),
    ({"best_of": True}, "best_of"),
    ({"best_of": 129}, "best_of"),
    ({"best_of": 1, "n": 2}, "best_of"),
    ({"best_of": 64, "prompt": ["x"] * 17}, "best_of"),
    ({"presence_penalty": 2.1}, "presence_penalty"),
    ({"presence_penalty": -2.1}, "presence_penalty"),
    ({"frequency_penalty": "0"}, "frequency_penalty"),
    ({"frequency_penalty": 3}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"repetition_penalty": 1e-300}, "repetition_penalty"),
    ({"repetition_penalty": 101}, "repetition_penalty"),
    ({"logit_bias": []}, "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias.5"),
    ({"logit_bias": {"5": "1"}}, "logit_bias.5"),
    ({"logit_bias": {"x": 1}}, "logit_bias.x"),
    ({"logit_bias": {"05": 1}}, "logit_bias.05"),
    ({"logit_bias": {"300": 1}}, "logit_bias.300"),
    ({"logit_bias": {"9999999999": 1}}, "logit_bias.9999999999"),
    ({"logit_bias": {str(token): 0 for token in range(1025)}}, "logit_bias"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
    ({"include_stop_str_in_output": "yes"}, "include_stop_str_in_output"),
    ({"skip_special_tokens": 0}, "skip_special_tokens"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
    ({"priority": 1 << 31}, "priority"),
    ({"priority": 0.5}, "priority"),
    ({"timeout": 0}, "timeout"),
    ({"timeout": 1e9}, "timeout"),
    ({"cache_salt": ""}, "cache_salt"),
    ({"cache_salt": "x" * 257}, "cache_salt"),
    ({"prompt_cache_key": 5}, "prompt_cache_key"),
    ({"service_tier": "priority"}, "service_tier"),
    ({"store": True}, "store"),
    ({"use_beam_search": True}, "use_beam_search"),
    ({"length_penalty": 0.5}, "length_penalty"),
    ({"guided_json": {}}, "guided_json"),
    ({"response_format": "json"}, "response_format"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.name"),
    ({"response_format": {"type": "json_object", "schema": {}}}, "response_format.schema"),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a", "json_object": True}}, "structured_outputs"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
    ({"structured_outputs": {"choice": ["a", ""]}}, "structured_outputs.choice.1"),
    ({"structured_outputs": {"json_object": False}}, "structured_outputs.json_object"),
    ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
    ({"structured_outputs": {"json": 5}}, "structured_outputs.json"),
    ({"structured_outputs": {"json": {"enum": list(range(100_000))}}}, "structured_outputs.json"),
    ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "response_format"),
    ({"metadata": {"a key": 5}}, "metadata.a key"),
    ({"tempreature": 1}, "tempreature"),
    ({"max-tokens": 1}, "max-tokens"),
    ({"messages": []}, "messages"),
]
CHAT_CASES: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": "hello"}, "messages"),
    ({"messages": ["hello"]}, "messages.0"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
    ({"messages": [{"role": "function", "content": "x"}]}, "messages.0.role"),
    ({"messages": [{"content": "x"}]}, "messages.0.role"),
    ({"messages": [{"role": "user"}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "text": ""}]}]}, "messages.0.content.0.type"),
    ({"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]}, "messages.0.tool_calls"),
    ({"messages": [{"role": "user", "content": "x", "mood": "good"}]}, "messages.0.mood"),
    ({"prompt": "x"}, "prompt"),
    ({"logprobs": 1}, "logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": False, "top_logprobs": 2}, "top_logprobs"),
    ({"prompt_logprobs": 21}, "prompt_logprobs"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ({"echo": True}, "echo"),
    ({"tools": [{"type": "function"}]}, "tools.0.function"),
    ({"tool_choice": "auto"}, "tool_choice"),
    ({"chat_template": "{{ x }}"}, "chat_template"),
    ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs.tokenize"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
]


def is_envelope(response: httpx.Response) -> bool:
    error = response.json()["error"]
    return (
        set(error) == {"message", "type", "param", "code"} and bool(error["message"]) and len(error["message"]) < 2000
    )


def test_every_bad_field_is_named(run: Any, open_site: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            for send, cases in ((site.complete, COMPLETION_CASES), (site.chat, CHAT_CASES)):
                for options, param in cases:
                    for stream in ({}, {} if "stream_options" in options else {"stream": True}):
                        response = await send(**{**stream, **options})
                        assert response.status_code == 400, (options, response.text)
                        assert is_envelope(response)
                        assert response.json()["error"]["param"] == param, (options, response.text)
            assert not site.engine.requests

    run(body())


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b"\xff\xfe",
        b'{"model": "base", "prompt": "\\ud800"}',
        b'{"model": "base", "prompt": "x", "temperature": NaN}',
        b'{"model": "base", "prompt": "x", "temperature": Infinity}',
        b'{"model": "base", "prompt": "x", "temperature": 1e999}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
    ],
)
def test_broken_json_is_400(run: Any, open_site: Any, raw: bytes) -> None:
    async def body() -> None:
        async with open_site() as site:
            headers = {"content-type": "application/json"}
            response = await site.http.post("/v1/completions", content=raw, headers=headers)
            assert response.status_code == 400, response.text
            assert is_envelope(response)

    run(body())


def test_other_content_types_are_refused(run: Any, open_site: Any) -> None:
    """A web page can send text/plain to another origin without asking; it cannot send JSON."""

    async def body() -> None:
        async with open_site() as site:
            text = json.dumps({"model": "base", "prompt": "x"})
            for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
                response = await site.http.post("/v1/completions", content=text, headers={"content-type": kind})
                assert response.status_code == 400
                assert response.json()["error"]["code"] == "invalid_content_type"

    run(body())


def test_bodies_over_the_cap_are_413_declared_or_not(run: Any, open_site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onebase.serve.api.body.MAX_JSON_BYTES", 1000)

    async def trickle() -> Any:
        for _ in range(20):
            yield b" " * 100

    async def body() -> None:
        async with open_site() as site:
            headers = {"content-type": "application/json"}
            for content in (b" " * 2000, trickle()):
                response = await site.http.post("/v1/completions", content=content, headers=headers)
                assert response.status_code == 413
                assert is_envelope(response)

    run(body())


def test_unknown_routes_methods_and_models_have_the_envelope(run: Any, open_site: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            cases = [
                (await site.http.get("/nope"), 404),
                (await site.http.get("/v1/completions"), 405),
                (await site.http.get("/v1/models/nope"), 404),
                (await site.http.get("/v1/models/nope/../base@0"), 404),
                (await site.complete(model="nope"), 404),
                (await site.complete(model="../../etc/passwd"), 404),
                (await site.complete(adapters=[{"name": "nope"}]), 404),
                (await site.chat(model="base@1"), 404),
            ]
            for response, status in cases:
                assert response.status_code == status, response.text
                assert is_envelope(response)
            assert cases[4][0].json()["error"]["code"] == "model_not_found"
            assert cases[1][0].headers["allow"] == "POST"

    run(body())


def test_an_unforeseen_error_is_500_in_the_envelope_and_tells_nothing(
    run: Any, open_site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body() -> None:
        async with open_site() as site:
            site.engine.failure = ZeroDivisionError("secret detail")
            response = await site.complete()
            assert response.status_code == 500
            assert is_envelope(response)
            assert "secret" not in response.text

    run(body())


def test_tokenize_routes(run: Any, open_site: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            answer = (await site.post("/tokenize", model="base", prompt="hello 😀", return_token_strs=True)).json()
            assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
            assert (await site.post("/detokenize", tokens=answer["tokens"])).json() == {"prompt": "hello 😀"}
            messages = [{"role": "user", "content": "hi"}]
            answer = (await site.post("/tokenize", messages=messages, add_generation_prompt=False)).json()
            text = (await site.post("/detokenize", tokens=answer["tokens"])).json()["prompt"]
            assert text == "user: hi\n"
            info = (await site.http.get("/tokenizer_info")).json()
            assert info["eos_token"] == "</s>"
            for bad in ({}, {"prompt": "x", "messages": messages}, {"prompt": "x", "model": "nope"}, {"prompt": 1}):
                assert (await site.post("/tokenize", **bad)).status_code in {400, 404}
            for tokens in ([300], [-1], "x", [2**40]):
                assert (await site.post("/detokenize", tokens=tokens)).status_code == 400

    run(body())


def test_text_far_over_the_context_is_refused_before_it_is_tokenised(
    run: Any, open_site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body() -> None:
        async with open_site() as site:
            monkeypatch.setattr(site.server.loaded.codec, "_encode", None)
            monkeypatch.setattr(site.server.loaded.workers.renderer, "run", None)
            long, longer = "x" * (256 * 32 + 1), "x" * ((1 << 20) + 1)
            halves = [{"role": "user", "content": text} for text in (long[:5000], long[5000:])]
            for response, param in (
                (await site.complete(prompt=["x", long]), "prompt"),
                (await site.chat(messages=halves), "messages"),
                (await site.post("/tokenize", prompt=longer), "prompt"),
                (await site.post("/tokenize", messages=[{"role": "user", "content": longer}]), "messages"),
            ):
                error = response.json()["error"]
                assert (response.status_code, error["param"]) == (400, param), error
                assert error["code"] == "context_length_exceeded"

    run(body())


def test_long_bodies_are_parsed_off_the_event_loop(run: Any, open_site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[bool] = []
    real = CompletionRequest.model_validate_json

    def parse(data: Any) -> CompletionRequest:
        threads.append(threading.current_thread() is threading.main_thread())
        return real(data)

    monkeypatch.setattr(CompletionRequest, "model_validate_json", parse)

    async def body() -> None:
        async with open_site() as site:
            assert (await site.complete()).status_code == 200
            assert (await site.complete(prompt=[65] * 70_000)).json()["error"]["code"] == "context_length_exceeded"
            assert (await site.complete(prompt=["x"] * 70_000)).json()["error"]["param"] == "prompt"
            assert (await site.complete(user="x" * 70_000)).json()["error"]["param"] == "user"
            assert threads == [True, False, False, False]

    run(body())


def test_long_text_is_tokenised_as_short_text_is(run: Any, open_site: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            text = "hello world " * 1000
            answer = (await site.post("/tokenize", prompt=text)).json()
            assert (await site.post("/detokenize", tokens=answer["tokens"])).json()["prompt"] == text

    run(body())

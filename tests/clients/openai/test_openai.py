"""OpenAI's own package, the newest and the last 1.x: its calls, and which exceptions it makes of our refusals."""

from __future__ import annotations

import asyncio
import base64
import struct
from collections.abc import Iterator
from typing import Any

import openai
import pytest

QUESTION = [{"role": "user", "content": "What colour is the fox?"}]


@pytest.fixture(scope="module")
def client(served: Any) -> Iterator[Any]:
    with openai.OpenAI(base_url=served.v1, api_key=served.key, max_retries=0) as client:
        yield client


def _chat(client: Any, model: str, **options: Any) -> Any:
    return client.chat.completions.create(model=model, messages=QUESTION, temperature=0, **options)


def test_models(client: Any, served: Any) -> None:
    models = list(client.models.list())
    assert [model.id for model in models] == [served.model, *sorted(served.adapters)]
    assert {model.object for model in models} == {"model"}
    one = client.models.retrieve("shout")
    assert (one.id, one.parent) == ("shout", served.model)


def test_completions(client: Any, served: Any) -> None:
    options: Any = {"prompt": "The fox is", "temperature": 0, "max_tokens": 8}
    for model in (served.model, *served.adapters):
        whole = client.completions.create(model=model, **options)
        assert (whole.object, whole.model) == ("text_completion", model)
        (choice,) = whole.choices
        assert choice.finish_reason in {"length", "stop"}
        assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
        pieces = list(client.completions.create(model=model, stream=True, **options))
        assert "".join(piece.choices[0].text for piece in pieces) == choice.text
        assert [piece.choices[0].finish_reason for piece in pieces][-1] == choice.finish_reason
    many = client.completions.create(model=served.model, **options | {"prompt": ["The fox", "A whale"]}, n=2)
    assert [choice.index for choice in many.choices] == [0, 1, 2, 3]
    assert many.choices[0].text == many.choices[1].text


def test_completion_logprobs(client: Any, served: Any) -> None:
    answer = client.completions.create(
        model="shout", prompt="The fox", max_tokens=3, temperature=0, logprobs=2, echo=True
    )
    told = answer.choices[0].logprobs
    assert told.token_logprobs[0] is None
    assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == len(told.text_offset)
    assert all(value <= 0 for value in told.token_logprobs[1:])
    assert all(
        max(top.values()) >= value for top, value in zip(told.top_logprobs[1:], told.token_logprobs[1:], strict=True)
    )


def test_chat(client: Any, served: Any) -> None:
    texts = {}
    for model in (served.model, *served.adapters):
        whole = _chat(client, model)
        (choice,) = whole.choices
        assert (whole.object, choice.message.role, choice.finish_reason) == ("chat.completion", "assistant", "stop")
        texts[model] = choice.message.content
        stream = _chat(client, model, stream=True, stream_options={"include_usage": True})
        *pieces, last = list(stream)
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == texts[model]
        assert pieces[0].choices[0].delta.role == "assistant"
        assert [piece.choices[0].finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["stop"]
        assert {piece.usage for piece in pieces} == {None}
        assert (last.choices, last.usage.completion_tokens) == ([], whole.usage.completion_tokens)
    assert len(set(texts.values())) == 3
    assert texts["shout"].isupper()


def test_chat_logprobs(client: Any, served: Any) -> None:
    answer = _chat(client, "pirate", logprobs=True, top_logprobs=3, max_completion_tokens=4)
    for one in answer.choices[0].logprobs.content:
        assert len(one.top_logprobs) == 3
        assert one.top_logprobs[0].logprob == pytest.approx(one.logprob)
        assert bytes(one.bytes).decode() == one.token
    text = "".join(one.token for one in answer.choices[0].logprobs.content)
    assert text == answer.choices[0].message.content


def test_n_stop_and_seed(client: Any, served: Any) -> None:
    hot: Any = {"model": served.model, "prompt": "A", "temperature": 2, "n": 3, "max_tokens": 12}
    first, again = (client.completions.create(**hot, seed=7) for _ in range(2))
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in again.choices]
    assert len(set(texts)) > 1
    full = _chat(client, "pirate").choices[0].message.content
    word = full.split()[2]
    cut = _chat(client, "pirate", stop=[word])
    assert cut.choices[0].message.content == full[: full.index(word)]
    assert cut.choices[0].finish_reason == "stop"


def test_embeddings(client: Any, served: Any) -> None:
    """The package asks for base64 by itself, and decodes it."""
    texts = ["The fox is red.", "A whale lives in the sea."]
    answer = client.embeddings.create(model="pirate", input=texts)
    assert [item.index for item in answer.data] == [0, 1]
    vector = answer.data[0].embedding
    assert sum(value * value for value in vector) == pytest.approx(1, abs=1e-5)
    numbers = client.embeddings.create(model="pirate", input=texts[0], encoding_format="float").data[0].embedding
    assert vector == pytest.approx(numbers, abs=1e-6)
    raw = client.embeddings.create(model="pirate", input=texts[0], encoding_format="base64").data[0].embedding
    if isinstance(raw, str):
        raw = list(struct.unpack(f"<{len(vector)}f", base64.b64decode(raw)))
    assert raw == pytest.approx(vector, abs=1e-6)
    assert len(client.embeddings.create(model="pirate", input=texts[0], dimensions=8).data[0].embedding) == 8


def test_the_asynchronous_client(served: Any) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=served.v1, api_key=served.key, max_retries=0) as client:
            models = [served.model, *served.adapters] * 3
            answers = await asyncio.gather(*(_chat(client, model) for model in models))
            return [answer.choices[0].message.content for answer in answers]

    texts = asyncio.run(ask())
    assert texts[:3] * 3 == texts
    assert len(set(texts)) == 3


REFUSALS: list[tuple[dict[str, Any], str, str, str | None]] = [
    ({"model": "nobody"}, "NotFoundError", "model_not_found", "model"),
    ({"temperature": 3}, "BadRequestError", "", "temperature"),
    ({"max_tokens": 100_000}, "BadRequestError", "context_length_exceeded", "messages"),
    ({"extra_body": {"novel": 1}}, "BadRequestError", "", "novel"),
    ({"extra_body": {"messages": [{"role": "user"}]}}, "BadRequestError", "", "messages.0.content"),
    ({"extra_body": {"top_p": "1"}}, "BadRequestError", "", "top_p"),
]


@pytest.mark.parametrize(("change", "kind", "code", "param"), REFUSALS, ids=[str(c[0])[:30] for c in REFUSALS])
def test_refusals_are_the_right_exceptions(
    client: Any, served: Any, change: dict[str, Any], kind: str, code: str, param: str | None
) -> None:
    with pytest.raises(getattr(openai, kind)) as caught:
        client.chat.completions.create(**{"model": served.model, "messages": QUESTION, **change})
    assert (caught.value.code or "") == code
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"
    assert caught.value.request_id
    assert client.chat.completions.with_raw_response


def test_keys(served: Any) -> None:
    with openai.OpenAI(base_url=served.v1, api_key="wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError):
            client.models.list()
        with pytest.raises(openai.AuthenticationError):
            _chat(client, served.model)


def test_overload_is_a_rate_limit(client: Any, served: Any) -> None:
    """A stream holds most places; the next request finds none until it has ended."""
    busy: Any = {"model": served.model, "prompt": "a", "max_tokens": 900, "n": 90, "extra_body": {"ignore_eos": True}}
    with client.completions.create(**busy, stream=True) as stream:
        next(iter(stream))
        with pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(model=served.model, prompt="a", n=10)
    assert int(caught.value.response.headers["retry-after"]) > 0


def test_request_ids(client: Any, served: Any) -> None:
    named = client.completions.with_raw_response.create(
        model=served.model, prompt="a", max_tokens=1, extra_headers={"x-request-id": "mine-1"}
    )
    assert named.headers["x-request-id"] == "mine-1"
    assert named.parse().id == "cmpl-mine-1"
    assert client.completions.create(model=served.model, prompt="a", max_tokens=1)._request_id

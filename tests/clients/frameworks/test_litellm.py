"""litellm, as a library: its OpenAI-compatible and vLLM providers, and its map of errors."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import litellm
import pytest

QUESTION = [{"role": "user", "content": "What colour is the fox?"}]
PARAMETERS = {
    "type": "object",
    "properties": {"animal": {"type": "string", "enum": ["fox", "owl"]}},
    "required": ["animal"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "colour_of", "parameters": PARAMETERS}}

litellm.telemetry = False
litellm.suppress_debug_info = True


def _options(served: Any, **more: Any) -> Any:
    return {"api_base": served.v1, "api_key": served.key, "num_retries": 0, "max_retries": 0, **more}


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm"])
def test_chat(served: Any, provider: str) -> None:
    texts = {}
    for model in (served.model, *served.adapters):
        asked = _options(served, model=f"{provider}/{model}", messages=QUESTION, temperature=0)
        whole = litellm.completion(**asked)
        texts[model] = whole.choices[0].message.content
        assert whole.choices[0].finish_reason == "stop"
        assert whole.usage.completion_tokens > 0
        pieces = list(litellm.completion(**asked, stream=True, stream_options={"include_usage": True}))
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == texts[model]
        assert asyncio.run(litellm.acompletion(**asked)).choices[0].message.content == texts[model]
    assert len(set(texts.values())) == 3


def test_logprobs_stop_and_n(served: Any) -> None:
    asked = _options(served, model="openai/shout", messages=QUESTION, temperature=0)
    answer = litellm.completion(**asked, logprobs=True, top_logprobs=2, n=2)
    assert len(answer.choices) == 2
    assert len(answer.choices[0].logprobs.content[0].top_logprobs) == 2
    text = answer.choices[0].message.content
    word = text.split()[1]
    assert litellm.completion(**asked, stop=[word]).choices[0].message.content == text[: text.index(word)]


def test_text_completion(served: Any) -> None:
    asked = _options(served, model="text-completion-openai/pirate", prompt="The fox", temperature=0, max_tokens=6)
    whole = litellm.text_completion(**asked)
    assert whole.choices[0].text
    pieces = litellm.text_completion(**asked, stream=True)
    assert "".join(piece.choices[0].text or "" for piece in pieces) == whole.choices[0].text


def test_embedding(served: Any) -> None:
    answer = litellm.embedding(**_options(served, model="openai/pirate", input=["a fox", "a whale"]))
    assert [item["index"] for item in answer.data] == [0, 1]
    assert sum(value * value for value in answer.data[0]["embedding"]) == pytest.approx(1, abs=1e-4)


def test_tools_and_structured_answers(served: Any) -> None:
    asked = _options(served, model="hosted_vllm/shout", messages=QUESTION, temperature=0, max_tokens=200)
    named = {"type": "function", "function": {"name": "colour_of"}}
    answer = litellm.completion(**asked, tools=[TOOL], tool_choice=named)
    (call,) = answer.choices[0].message.tool_calls
    assert json.loads(call.function.arguments)["animal"] in {"fox", "owl"}
    pieces = list(litellm.completion(**asked, tools=[TOOL], tool_choice=named, stream=True))
    whole = litellm.stream_chunk_builder(pieces)
    assert whole.choices[0].message.tool_calls[0].function.arguments == call.function.arguments
    schema = {"name": "one", "schema": PARAMETERS, "strict": True}
    told = litellm.completion(**asked, response_format={"type": "json_schema", "json_schema": schema})
    assert json.loads(told.choices[0].message.content)["animal"] in {"fox", "owl"}


def test_refusals(served: Any) -> None:
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(**_options(served, model="openai/nobody", messages=QUESTION))
    with pytest.raises(litellm.BadRequestError, match="novel"):
        litellm.completion(**_options(served, model="openai/shout", messages=QUESTION, extra_body={"novel": 1}))
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(**_options(served, model="openai/shout", messages=QUESTION, max_tokens=100_000))
    with pytest.raises(litellm.AuthenticationError):
        litellm.completion(**(_options(served, model="openai/shout", messages=QUESTION) | {"api_key": "wrong"}))

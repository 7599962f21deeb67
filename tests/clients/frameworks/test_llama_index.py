"""llama-index's OpenAILike: chat and completion, in one go and streamed."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike

QUESTION = [ChatMessage(role="user", content="What colour is the fox?")]


def _like(served: Any, model: str, **options: Any) -> OpenAILike:
    return OpenAILike(
        **{
            "model": model,
            "api_base": served.v1,
            "api_key": served.key,
            "is_chat_model": True,
            "temperature": 0,
            "max_retries": 0,
            "context_window": 1024,
            **options,
        }
    )


def test_chat(served: Any) -> None:
    texts = {}
    for model in (served.model, *served.adapters):
        like = _like(served, model)
        texts[model] = like.chat(QUESTION).message.content
        *_, last = like.stream_chat(QUESTION)
        assert last.message.content == texts[model]
        assert asyncio.run(_like(served, model).achat(QUESTION)).message.content == texts[model]
    assert len(set(texts.values())) == 3


def test_completion(served: Any) -> None:
    like = _like(served, "pirate", is_chat_model=False, max_tokens=6)
    whole = like.complete("The fox").text
    assert whole
    *_, last = like.stream_complete("The fox")
    assert last.text == whole


def test_logprobs_and_stop(served: Any) -> None:
    answer = _like(served, "shout", additional_kwargs={"logprobs": True, "top_logprobs": 2}).chat(QUESTION)
    assert answer.raw.choices[0].logprobs.content
    text = answer.message.content
    word = text.split()[1]
    cut = _like(served, "shout", additional_kwargs={"stop": [word]}).chat(QUESTION)
    assert cut.message.content == text[: text.index(word)].rstrip() or cut.message.content == text[: text.index(word)]


def colour_of(animal: str) -> str:
    """The colour of an animal."""
    return f"{animal} is red"


def test_tools(served: Any) -> None:
    like = _like(served, "shout", is_function_calling_model=True, max_tokens=200)
    tool = FunctionTool.from_defaults(colour_of)
    answer = like.chat_with_tools([tool], user_msg="What colour is the fox?", tool_required=True)
    (call,) = like.get_tool_calls_from_response(answer)
    assert call.tool_name == "colour_of"
    assert isinstance(call.tool_kwargs["animal"], str)


def test_refusals(served: Any) -> None:
    with pytest.raises(openai.NotFoundError):
        _like(served, "nobody").chat(QUESTION)
    with pytest.raises(openai.BadRequestError, match="novel"):
        _like(served, "shout", additional_kwargs={"extra_body": {"novel": 1}}).chat(QUESTION)
    with pytest.raises(openai.AuthenticationError):
        _like(served, "shout", api_key="wrong").chat(QUESTION)

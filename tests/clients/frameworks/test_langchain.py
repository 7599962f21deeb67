"""langchain-openai: chat, completions and embeddings, in one go and streamed."""

from __future__ import annotations

import asyncio
import itertools
import operator
from typing import Any, Literal

import openai
import pytest
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel

QUESTION = "What colour is the fox?"


def _chat(served: Any, model: str, **options: Any) -> ChatOpenAI:
    return ChatOpenAI(model=model, base_url=served.v1, api_key=served.key, temperature=0, max_retries=0, **options)


def test_chat_whole_streamed_and_in_batches(served: Any) -> None:
    texts = {}
    for model in (served.model, *served.adapters):
        chat = _chat(served, model)
        whole = chat.invoke(QUESTION)
        texts[model] = whole.content
        assert whole.response_metadata["finish_reason"] == "stop"
        assert whole.usage_metadata["total_tokens"] > whole.usage_metadata["output_tokens"] > 0
        pieces = list(chat.stream(QUESTION, stream_usage=True))
        assert "".join(piece.content for piece in pieces) == texts[model]
        assert sum(p.usage_metadata["output_tokens"] for p in pieces if p.usage_metadata) > 0
        assert [answer.content for answer in chat.batch([QUESTION] * 3)] == [texts[model]] * 3
    assert len(set(texts.values())) == 3

    async def together() -> list[Any]:
        return await asyncio.gather(*(_chat(served, model).ainvoke(QUESTION) for model in texts))

    assert [answer.content for answer in asyncio.run(together())] == list(texts.values())


def test_logprobs_stop_and_n(served: Any) -> None:
    answer = _chat(served, "shout", logprobs=True, top_logprobs=2).invoke(QUESTION)
    assert all(len(one["top_logprobs"]) == 2 for one in answer.response_metadata["logprobs"]["content"])
    word = answer.content.split()[1]
    cut = _chat(served, "shout").invoke(QUESTION, stop=[word])
    assert cut.content == answer.content[: answer.content.index(word)]
    several = _chat(served, "shout", n=2).generate([[HumanMessage(QUESTION)]])
    assert len(several.generations[0]) == 2


def test_completions(served: Any) -> None:
    model = OpenAI(model="pirate", base_url=served.v1, api_key=served.key, temperature=0, max_tokens=6, max_retries=0)
    whole = model.invoke("The fox")
    assert whole
    assert "".join(model.stream("The fox")) == whole


def test_embeddings(served: Any) -> None:
    """Without check_embedding_ctx_length False it would send ids of another model's tokenizer."""
    embeddings = OpenAIEmbeddings(
        model="pirate", base_url=served.v1, api_key=served.key, check_embedding_ctx_length=False, max_retries=0
    )
    one, other = embeddings.embed_documents(["The fox is red.", "A whale lives in the sea."])
    assert len(one) == len(other)
    assert embeddings.embed_query("The fox is red.") == pytest.approx(one, abs=1e-5)


class Sighting(BaseModel):
    """An animal that was seen."""

    animal: Literal["fox", "owl"]
    count: int


def colour_of(animal: Literal["fox", "owl"], loud: bool) -> str:
    """The colour of an animal."""
    return f"{animal}: {loud}"


def test_tools(served: Any) -> None:
    chat = _chat(served, "shout", max_tokens=200).bind_tools([colour_of], tool_choice="colour_of")
    (call,) = chat.invoke(QUESTION).tool_calls
    assert call["name"] == "colour_of"
    assert colour_of(**call["args"])
    *_, last = itertools.accumulate(chat.stream(QUESTION), operator.add)
    assert last.tool_calls[0]["args"] == call["args"]


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_answers(served: Any, method: Any) -> None:
    chat = _chat(served, "pirate", max_tokens=200).with_structured_output(Sighting, method=method)
    assert isinstance(chat.invoke(QUESTION), Sighting)


def test_refusals(served: Any) -> None:
    with pytest.raises(openai.NotFoundError):
        _chat(served, "nobody").invoke(QUESTION)
    with pytest.raises(openai.BadRequestError, match="novel"):
        _chat(served, served.model, extra_body={"novel": 1}).invoke(QUESTION)

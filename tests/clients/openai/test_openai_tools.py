"""Tools, structured output and the Responses API, as OpenAI's package asks for them and reads them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel

QUESTION = [{"role": "user", "content": "What colour is the fox?"}]
PARAMETERS = {
    "type": "object",
    "properties": {"animal": {"type": "string", "enum": ["fox", "owl"]}, "loud": {"type": "boolean"}},
    "required": ["animal", "loud"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "colour_of", "description": "A colour.", "parameters": PARAMETERS}}
OTHER = {"type": "function", "function": {"name": "age_of", "parameters": PARAMETERS}}


class Sighting(BaseModel):
    animal: Literal["fox", "owl"]
    count: int


@pytest.fixture(scope="module")
def client(served: Any) -> Iterator[Any]:
    with openai.OpenAI(base_url=served.v1, api_key=served.key, max_retries=0) as client:
        yield client


def _is_call(name: str, arguments: str) -> bool:
    given = json.loads(arguments)
    return name == "colour_of" and given["animal"] in {"fox", "owl"} and isinstance(given["loud"], bool)


@pytest.mark.parametrize("model", ["valley", "shout"])
def test_forced_calls(client: Any, model: str) -> None:
    asked: Any = {"model": model, "messages": QUESTION, "tools": [TOOL, OTHER], "max_tokens": 200, "temperature": 0}
    named = {"type": "function", "function": {"name": "colour_of"}}
    answer = client.chat.completions.create(**asked, tool_choice=named)
    (choice,) = answer.choices
    (call,) = choice.message.tool_calls
    assert call.type == "function"
    assert call.id
    assert _is_call(call.function.name, call.function.arguments)
    pieces = list(client.chat.completions.create(**asked, tool_choice=named, stream=True))
    deltas = [one for piece in pieces for one in piece.choices[0].delta.tool_calls or ()]
    assert deltas[0].id
    assert deltas[0].function.name == "colour_of"
    assert all(one.id is None for one in deltas[1:])
    assert "".join(one.function.arguments or "" for one in deltas) == call.function.arguments
    assert pieces[-1].choices[0].finish_reason == choice.finish_reason
    required = client.chat.completions.create(**asked, tool_choice="required", parallel_tool_calls=False)
    (one,) = required.choices[0].message.tool_calls
    assert one.function.name in {"colour_of", "age_of"}
    told = [*QUESTION, choice.message, {"role": "tool", "tool_call_id": call.id, "content": "red"}]
    after = client.chat.completions.create(**asked | {"messages": told}, tool_choice="none")
    assert after.choices[0].message.tool_calls is None


def test_structured_answers(client: Any) -> None:
    asked: Any = {"messages": QUESTION, "max_tokens": 100, "temperature": 1}
    for model in ("valley", "pirate"):
        parsed = client.chat.completions.parse(model=model, **asked, response_format=Sighting)
        assert parsed.choices[0].message.parsed.animal in {"fox", "owl"}
    schema = {"name": "flag", "schema": {"type": "object", "properties": {"on": {"type": "boolean"}}}}
    strict = schema | {"strict": True}
    strict["schema"] = {**schema["schema"], "required": ["on"], "additionalProperties": False}
    whole = client.chat.completions.create(
        model="shout", **asked, response_format={"type": "json_schema", "json_schema": strict}
    )
    assert json.loads(whole.choices[0].message.content).keys() == {"on"}
    chosen = client.completions.create(
        model="shout", prompt="x", max_tokens=20, extra_body={"structured_outputs": {"choice": ["red", "blue"]}}
    )
    assert chosen.choices[0].text in {"red", "blue"}


def test_bad_schemas_are_bad_requests(client: Any) -> None:
    for schema in ({"type": "novel"}, {"$ref": "#/nowhere"}):
        given = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="shout", messages=QUESTION, response_format=given)
        assert caught.value.param.startswith("response_format")


def test_responses(client: Any) -> None:
    asked: Any = {"model": "shout", "input": "What colour is the fox?", "temperature": 0}
    whole = client.responses.create(**asked)
    assert whole.status == "completed"
    assert whole.output_text.isupper()
    events = list(client.responses.create(**asked, stream=True))
    assert events[0].type == "response.created"
    assert events[-1].type == "response.completed"
    assert "".join(one.delta for one in events if one.type == "response.output_text.delta") == whole.output_text
    assert events[-1].response.output_text == whole.output_text
    assert whole.usage.total_tokens == whole.usage.input_tokens + whole.usage.output_tokens

"""/v1/responses: every answer and every event is what the openai package's own models say."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from onebase.adapters.errors import EngineDead

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
WEATHER = {"type": "function", "name": "weather", "parameters": {"type": "object", "properties": {}}, "strict": False}
EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


@pytest.fixture(autouse=True)
def long_context(engine: Any) -> None:
    engine.details = replace(engine.details, max_model_len=8192)


def saying(site: Any, replies: Any, text: str, reason: str = "stop") -> None:
    tokens = site.encode(text)
    site.engine.reply = replies([*tokens, 1] if reason == "stop" else tokens, reason)


async def ask(site: Any, **body: Any) -> Any:
    return await site.post("/v1/responses", **{"model": "base", "input": "hello", **body})


def parsed(model: type[BaseModel] | None, data: Any) -> Any:
    """Strictly, and with no field that OpenAI does not have; a function's name at its end is for older packages."""
    made = EVENTS.validate_python(data) if model is None else model.model_validate(data)
    allowed = [".name"] if getattr(made, "type", "") == "response.function_call_arguments.done" else []
    assert _extras(made) == allowed
    return made


def _extras(value: Any, path: str = "") -> list[str]:
    if isinstance(value, BaseModel):
        own = [f"{path}.{name}" for name in value.model_extra or {}]
        fields = ((name, getattr(value, name)) for name in type(value).model_fields)
        return own + [extra for name, item in fields for extra in _extras(item, f"{path}.{name}")]
    if isinstance(value, list):
        return [extra for index, item in enumerate(value) for extra in _extras(item, f"{path}.{index}")]
    return []


def events_of(response: Any) -> list[Any]:
    assert response.status_code == 200, response.text
    found = []
    for block in response.text.split("\n\n")[:-1]:
        name, data = block.split("\n")
        event = parsed(None, json.loads(data.removeprefix("data: ")))
        assert name == f"event: {event.type}"
        found.append(event)
    assert [event.sequence_number for event in found] == list(range(len(found)))
    return found


def without_ids(response: Any) -> Any:
    told = response.model_dump(exclude={"id", "created_at", "completed_at"})
    for item in told["output"]:
        del item["id"]
        item.pop("call_id", None)
    return told


def whole(response: Any) -> Any:
    assert response.status_code == 200, response.text
    return parsed(Response, response.json())


@pytest.mark.parametrize(
    ("text", "options", "kinds"),
    [
        ("hi there", {}, ["message"]),
        (CALL, {"tools": [WEATHER]}, ["function_call"]),
        (f"I look. {CALL}\n{CALL}\nDone", {"tools": [WEATHER]},
         ["message", "function_call", "function_call", "message"]),
        ("", {}, ["message"]),
        ("x", {"include": ["message.output_text.logprobs"]}, ["message"]),
    ],
)  # fmt: skip
def test_streamed_and_not_it_is_the_same(
    run: Any, open_site: Any, replies: Any, text: str, options: dict[str, Any], kinds: list[str]
) -> None:
    async def body() -> None:
        async with open_site() as site:
            saying(site, replies, text)
            response = whole(await ask(site, **options))
            assert response.status == "completed"
            assert [item.type for item in response.output] == kinds
            assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens
            assert response.output_text == "".join(text.replace(" " + CALL, CALL).split(CALL)).replace("\n\n", "")
            events = events_of(await ask(site, **options, stream=True))
            assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
            assert events[-1].type == "response.completed"
            assert without_ids(events[-1].response) == without_ids(response)
            _check_deltas(events)

    def _check_deltas(events: list[Any]) -> None:
        final = events[-1].response.output
        for index, item in enumerate(final):
            mine = [event for event in events if getattr(event, "output_index", None) == index]
            assert mine[0].type == "response.output_item.added"
            assert mine[-1].type == "response.output_item.done"
            assert mine[-1].item == item
            assert mine[0].item.id == item.id
            deltas = "".join(event.delta for event in mine if event.type.endswith(".delta"))
            assert deltas == (item.arguments if item.type == "function_call" else item.content[0].text)

    run(body())


def test_a_cut_answer_is_incomplete(run: Any, open_site: Any, replies: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            saying(site, replies, "hi there", "length")
            response = whole(await ask(site, max_output_tokens=3))
            assert response.status == "incomplete"
            assert response.incomplete_details.reason == "max_output_tokens"
            assert response.output[0].status == "incomplete"
            events = events_of(await ask(site, stream=True))
            assert events[-1].type == "response.incomplete"

    run(body())


def test_a_failure_under_way_is_the_last_event(run: Any, open_site: Any, replies: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            saying(site, replies, "hi there and so on")
            site.engine.die_after = 2
            events = events_of(await ask(site, stream=True))
            assert events[-1].type == "response.failed"
            assert events[-1].response.status == "failed"
            assert events[-1].response.error.code == "server_error"
            site.engine.failure = EngineDead("gone")
            site.engine.ready = True
            assert (await ask(site, stream=True)).status_code == 503

    run(body())


def test_a_conversation_goes_on_with_what_was_answered(run: Any, open_site: Any, replies: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            saying(site, replies, f"I look. {CALL}")
            first = (await ask(site, tools=[WEATHER])).json()
            call = first["output"][1]["call_id"]
            turns = [
                {"role": "user", "content": [{"type": "input_text", "text": "hello"}]},
                *first["output"],
                {"type": "function_call_output", "call_id": call, "output": "rain"},
            ]
            response = await ask(site, input=turns, instructions="Be brief.", tools=[WEATHER])
            assert response.status_code == 200, response.text
            text = site.server.loaded.codec.decode(site.engine.requests[-1].prompt)
            assert text.startswith("system: Be brief.\n\n# Tools")
            assert f"user: hello\nassistant: I look.\n{CALL}\n" in text.replace("\\u00f6", "ö")
            assert "<tool_response>\nrain\n</tool_response>" in text

    run(body())


def test_structured_text(run: Any, open_site: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
            form = {"type": "json_schema", "name": "place", "schema": schema, "strict": True}
            response = whole(await ask(site, text={"format": form}, max_output_tokens=3))
            assert response.text.format.schema_ == schema
            grammar = site.engine.requests[-1].sampling.grammar
            assert json.loads(grammar.source) == schema
            bad = await ask(site, text={"format": {**form, "schema": {"type": "nope"}}})
            assert bad.status_code == 400
            assert bad.json()["error"]["param"].startswith("text.format")

    run(body())


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"store": True}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"reasoning": {"effort": "high"}}, "reasoning"),
        ({"truncation": "auto"}, "truncation"),
        ({"tool_choice": {"type": "function"}, "tools": [WEATHER]}, "tool_choice"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tools": [{**WEATHER, "parameters": {"type": "array"}}]}, "tools.0.parameters"),
        ({"tools": [WEATHER, WEATHER]}, "tools.1.name"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0.type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content.0.type"),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]}, "input"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"temperature": 3}, "temperature"),
        ({"messages": []}, "messages"),
        ({"include": ["file_search_call.results"]}, "include.0"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format"),
        ({"stream_options": {"include_obfuscation": True}}, "stream_options"),
    ],
)
def test_what_is_refused(run: Any, open_site: Any, options: dict[str, Any], param: str) -> None:
    async def body() -> None:
        async with open_site() as site:
            response = await ask(site, **options)
            assert response.status_code == 400, response.text
            assert response.json()["error"]["param"] == param, response.text
            assert not site.engine.requests

    run(body())


@pytest.mark.parametrize("kind", ["item_reference", 5, {"a": 1}])
def test_an_unknown_item_is_told_which_there_are(run: Any, open_site: Any, kind: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            error = (await ask(site, input=[{"type": kind, "id": "x"}])).json()["error"]
            assert "type_of" not in error["message"]
            assert all(word in error["message"] for word in ("'message'", "'function_call'", "'function_call_output'"))

    run(body())


@pytest.mark.parametrize("reasoning", [None, {}, {"effort": None}, {"effort": None, "summary": None}])
def test_reasoning_may_be_sent_empty(run: Any, open_site: Any, reasoning: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            assert (await ask(site, reasoning=reasoning)).status_code == 200

    run(body())

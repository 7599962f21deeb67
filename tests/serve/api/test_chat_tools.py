"""Chat with tools over HTTP: what the template is told, what calls come out as, streamed and not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
NATIVE = (
    "{% if tools %}{{ tools | tojson }}<tool_call>{% endif %}{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% if m.tool_calls %}{{ m.tool_calls[0].function.arguments.city }}{% endif %}{{ '\n' }}{% endfor %}"
)
TURNS = [
    {"role": "user", "content": "hello"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Köln"}'}}
        ],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "rain"},
]


@pytest.fixture(autouse=True)
def long_context(engine: Any) -> None:
    engine.details = replace(engine.details, max_model_len=8192)


def saying(site: Any, replies: Any, text: str, reason: str = "stop") -> None:
    """The engine answers with this text, a token at a time."""
    tokens = site.encode(text)
    site.engine.reply = replies([*tokens, 1] if reason == "stop" else tokens, reason)


def prompt_of(site: Any) -> str:
    return str(site.server.loaded.codec.decode(site.engine.requests[-1].prompt))


def chunks_of(response: Any) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_a_call_comes_out_as_openai_has_it(run: Any, open_site: Any, replies: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            saying(site, replies, f"I look.\n{CALL}")
            choice = (await site.chat(tools=[WEATHER])).json()["choices"][0]
            assert choice["finish_reason"] == "tool_calls"
            message = choice["message"]
            assert message["content"] == "I look."
            (call,) = message["tool_calls"]
            assert call["id"].startswith("call_")
            assert call["type"] == "function"
            assert call["function"] == {"name": "weather", "arguments": '{"city": "Köln"}'}

    run(body())


def test_streamed_calls_are_id_and_name_first_then_arguments(run: Any, open_site: Any, replies: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            saying(site, replies, f"I look.\n{CALL}\n{CALL}")
            response = await site.chat(tools=[WEATHER], stream=True)
            deltas = [chunk["choices"][0]["delta"] for chunk in chunks_of(response)]
            assert "".join(delta.get("content") or "" for delta in deltas) == "I look."
            calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
            for index in (0, 1):
                first, *rest = [call for call in calls if call["index"] == index]
                assert first["id"]
                assert first["type"] == "function"
                assert first["function"]["name"] == "weather"
                assert all("id" not in call for call in rest)
                assert len(rest) > 1
                text = "".join(call["function"]["arguments"] for call in (first, *rest))
                assert json.loads(text) == {"city": "Köln"}
            reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks_of(response)]
            assert reasons[-1] == "tool_calls"
            assert set(reasons[:-1]) == {None}

    run(body())


@pytest.mark.parametrize("stream", [False, True])
def test_without_parallel_calls_the_answer_ends_behind_the_first(
    run: Any, open_site: Any, replies: Any, stream: bool
) -> None:
    async def body() -> None:
        async with open_site() as site:
            saying(site, replies, f"{CALL}\n{CALL} and so on")
            response = await site.chat(tools=[WEATHER], parallel_tool_calls=False, stream=stream)
            assert response.text.count('"weather"') == 1
            assert '"finish_reason":"tool_calls"' in response.text
            assert site.engine.aborted, "what follows the call is not generated"

    run(body())


def test_cut_short_calls_and_unknown_tools(run: Any, open_site: Any, replies: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            saying(site, replies, CALL[:-20], "length")
            choice = (await site.chat(tools=[WEATHER])).json()["choices"][0]
            assert choice["finish_reason"] == "length"
            assert choice["message"]["tool_calls"][0]["function"]["arguments"].startswith('{"ci')
            saying(site, replies, CALL.replace("weather", "other"))
            choice = (await site.chat(tools=[WEATHER])).json()["choices"][0]
            assert choice["message"]["content"] == CALL.replace("weather", "other")
            assert choice["finish_reason"] == "stop"
            assert "tool_calls" not in choice["message"]
            saying(site, replies, CALL)
            for options in ({}, {"tools": [WEATHER], "tool_choice": "none"}, {"tools": []}):
                message = (await site.chat(**options)).json()["choices"][0]["message"]
                assert message["content"] == CALL, "nobody asked for calls"

    run(body())


def test_a_template_without_tools_gets_them_in_words(run: Any, open_site: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            turns = [{"role": "system", "content": "Be brief."}, *TURNS, {"role": "user", "content": "thanks"}]
            response = await site.post("/tokenize", messages=turns, tools=[WEATHER])
            text = site.server.loaded.codec.decode(response.json()["tokens"])
            assert text.startswith("system: Be brief.\n\n# Tools")
            assert json.dumps(WEATHER["function"]["name"]) in text
            assert f"assistant: {CALL}\n" in text.replace("\\u00f6", "ö")
            assert "user: <tool_response>\nrain\n</tool_response>\nthanks\n" in text
            plain = await site.post("/tokenize", messages=TURNS)
            assert "# Tools" not in site.server.loaded.codec.decode(plain.json()["tokens"])

    run(body())


def test_a_template_with_tools_gets_them_as_they_are(
    run: Any, open_site: Any, model_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "native"
    folder.mkdir()
    for file in model_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "chat_template.jinja").write_text(NATIVE)

    async def body() -> None:
        async with open_site(model=str(folder)) as site:
            response = await site.chat(messages=TURNS, tools=[WEATHER], max_tokens=1)
            assert response.status_code == 200, response.text
            text = prompt_of(site)
            assert json.loads(text.partition("<tool_call>")[0]) == [WEATHER]
            assert "assistant: Köln\ntool: rain\n" in text

    run(body())


def bad(turns: Any, param: str) -> tuple[dict[str, Any], str]:
    return {"messages": turns}, param


USER, ASKED, RESULT = TURNS
NAMED = {"type": "function", "function": {"name": "weather"}}


@pytest.mark.parametrize(
    ("options", "param"),
    [
        bad([USER, RESULT], "messages.1.tool_call_id"),
        bad([USER, ASKED], "messages.1.tool_calls"),
        bad([USER, ASKED, USER], "messages.1.tool_calls"),
        bad([USER, ASKED, RESULT, RESULT], "messages.3.tool_call_id"),
        bad([USER, {"role": "assistant"}], "messages.1.content"),
        bad([USER, {"role": "assistant", "content": None, "tool_calls": []}], "messages.1.content"),
        bad([USER, {**ASKED, "tool_calls": ASKED["tool_calls"] * 2}, RESULT], "messages.1.tool_calls"),
        bad([USER, {**RESULT, "tool_call_id": None}], "messages.1.tool_call_id"),
        bad([{**USER, "tool_call_id": "c1"}], "messages.0.tool_call_id"),
        bad([USER, {"role": "assistant", "content": "x", "reasoning_content": "hm"}], "reasoning_content"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"tools": [WEATHER, WEATHER]}, "tools.1.function.name"),
        ({"tools": [WEATHER] * 129}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}]},
         "tools.0.function.parameters"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": "maybe"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {**NAMED, "function": {"name": "other"}}}, "tool_choice"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
        ({"chat_template_kwargs": {"x": "y" * 20_000}}, "chat_template_kwargs"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
    ],
)  # fmt: skip
def test_what_is_refused(run: Any, open_site: Any, options: dict[str, Any], param: str) -> None:
    async def body() -> None:
        async with open_site() as site:
            response = await site.chat(**options)
            assert response.status_code == 400, response.text
            assert response.json()["error"]["param"] == param, response.text
            assert not site.engine.requests

    run(body())


def test_deeply_nested_schemas_are_refused(run: Any, open_site: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            deep: Any = {}
            for _ in range(60):
                deep = {"properties": {"a": deep}}
            response = await site.chat(tools=[{"type": "function", "function": {"name": "f", "parameters": deep}}])
            assert response.json()["error"]["param"] == "tools.0.function.parameters"

    run(body())


def test_half_a_surrogate_pair_in_arguments_is_400(
    run: Any, open_site: Any, model_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "native"
    folder.mkdir()
    for file in model_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "chat_template.jinja").write_text(NATIVE)
    function = {"name": "weather", "arguments": '{"city": "\\ud800"}'}
    asked = {**ASKED, "tool_calls": [{"id": "c1", "type": "function", "function": function}]}

    async def body() -> None:
        async with open_site(model=str(folder)) as site:
            response = await site.chat(messages=[USER, asked, RESULT])
            assert response.status_code == 400, response.text
            assert response.json()["error"]["code"] == "chat_template"

    run(body())


def test_the_last_message_is_continued(run: Any, open_site: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            turns = [USER, {"role": "assistant", "content": "The answer is "}]
            response = await site.chat(messages=turns, continue_final_message=True, max_tokens=1)
            assert response.status_code == 200, response.text
            assert prompt_of(site) == "user: hello\nassistant: The answer is "
            response = await site.chat(messages=turns, add_generation_prompt=False, max_tokens=1)
            assert prompt_of(site) == "user: hello\nassistant: The answer is \n"
            response = await site.chat(chat_template_kwargs={"add": 1}, add_special_tokens=True, max_tokens=1)
            assert response.status_code == 200

    run(body())


def test_prompt_logprobs(run: Any, open_real: Any) -> None:
    async def body() -> None:
        async with open_real() as site:
            response = await site.chat(prompt_logprobs=2, max_tokens=2)
            told = response.json()["choices"][0]["prompt_logprobs"]
            assert told[0] is None
            assert len(told) == response.json()["usage"]["prompt_tokens"]
            assert all(len(one) in {2, 3} for one in told[1:])

    run(body())


@pytest.mark.parametrize("options", [{"tool_choice": "required"}, {}])
def test_a_schema_that_cannot_be_enforced_is_told_with_its_tool(
    run: Any, open_site: Any, options: dict[str, Any]
) -> None:
    def tool(name: str, schema: dict[str, Any]) -> dict[str, Any]:
        described = {"type": "object", "properties": {"x": schema}}
        return {"type": "function", "function": {"name": name, "parameters": described, "strict": True}}

    async def body() -> None:
        async with open_site() as site:
            tools = [tool("fine", {"type": "null"}), tool("also", {"type": "string"}), tool("bad", {"pattern": "("})]
            error = (await site.chat(tools=tools, **options)).json()["error"]
            assert error["param"] == "tools.2.function.parameters"
            assert "'bad'" in error["message"]
            assert error["code"] == "invalid_grammar"
            answered = await site.post("/v1/responses", model="base", input="x", tools=[
                {"type": "function", **one["function"]} for one in tools], **options)  # fmt: skip
            assert answered.json()["error"]["param"] == "tools.2.parameters"
            assert not site.engine.requests

    run(body())


@pytest.mark.parametrize("choice", ["maybe", 5, {}, {"type": "function"}, {"type": "x", "function": {"name": "f"}}])
def test_a_tool_choice_of_no_known_form_is_told_all_of_them(run: Any, open_site: Any, choice: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            error = (await site.chat(tools=[WEATHER], tool_choice=choice)).json()["error"]
            assert error["param"] == "tool_choice"
            assert all(word in error["message"] for word in ("'none'", "'auto'", "'required'", '"function"'))
            unknown = {"type": "function", "function": {"name": "other"}}
            error = (await site.chat(tools=[WEATHER], tool_choice=unknown)).json()["error"]
            assert "weather" in error["message"]

    run(body())

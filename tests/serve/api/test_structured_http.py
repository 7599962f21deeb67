"""Structured output over HTTP: fields, errors, and answers of the demo's model that all match their schemas."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from itertools import cycle, islice
from typing import Any

import jsonschema
import pytest

from onebase.serve.api.structured import one_of
from onebase.serve.config import Settings
from onebase.serve.demo import ADAPTERS, BASE
from onebase.serve.engine.inprocess import InProcessEngine
from onebase.serve.engine.messages import Grammar

from .conftest import running_site
from .schemas import SCHEMAS


def _format(schema: Any, **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, **more}}


ASKED: list[tuple[dict[str, Any], Grammar | None]] = [
    ({"response_format": {"type": "text"}}, None),
    ({"response_format": None, "structured_outputs": None}, None),
    ({"response_format": {"type": "json_object"}}, Grammar("json_schema", '{"type":"object"}')),
    ({"response_format": _format({"type": "null"}, strict=True)}, Grammar("json_schema", '{"type": "null"}')),
    ({"structured_outputs": {"json": {"type": "null"}}}, Grammar("json_schema", '{"type": "null"}')),
    ({"structured_outputs": {"json": '{"type":"null"}'}}, Grammar("json_schema", '{"type":"null"}')),
    ({"structured_outputs": {"json_object": True}}, Grammar("json_schema", '{"type":"object"}')),
    ({"structured_outputs": {"regex": "a+"}}, Grammar("regex", "a+")),
    ({"structured_outputs": {"grammar": 'start: "a"'}}, Grammar("lark", 'start: "a"')),
    ({"structured_outputs": {"choice": ["yes", "nö"]}}, one_of(["yes", "nö"])),
]
BAD: list[tuple[dict[str, Any], str]] = [
    ({"response_format": _format({"type": "strange"})}, "response_format.json_schema.schema"),
    ({"response_format": _format({"not": {}})}, "response_format.json_schema.schema"),
    ({"response_format": _format({"$ref": "http://127.0.0.1/x"})}, "response_format.json_schema.schema"),
    ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
    ({"structured_outputs": {"regex": "(?=a)"}}, "structured_outputs.regex"),
    ({"structured_outputs": {"grammar": "root ::= a"}}, "structured_outputs.grammar"),
]


def test_every_way_to_ask_reaches_the_engine_as_a_grammar(run: Any, open_site: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            for send in (site.complete, site.chat):
                for options, wanted in ASKED:
                    response = await send(**options, max_tokens=2)
                    assert response.status_code == 200, (options, response.text)
                    assert site.engine.requests[-1].sampling.grammar == wanted

    run(body())


def test_bad_grammars_are_400_on_their_field_and_the_engine_never_hears_of_them(run: Any, open_site: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            for send in (site.complete, site.chat):
                for options, param in BAD:
                    response = await send(**options)
                    assert response.status_code == 400, (options, response.text)
                    assert response.json()["error"]["param"] == param
                    assert response.json()["error"]["code"] == "invalid_grammar"
            assert not site.engine.requests

    run(body())


@pytest.fixture
def open_demo(settings_for: Callable[..., Settings]) -> Callable[[], Any]:
    def make() -> Any:
        settings = settings_for(model=str(BASE), dtype="float32", device="cpu", kv_memory=0.05)
        return running_site(settings, InProcessEngine(settings.engine_config()))  # type: ignore[arg-type]

    return make


def test_special_tokens_that_the_model_has_not_are_told_with_the_field(run: Any, open_demo: Any) -> None:
    """Only the engine knows them: its refusal names what the client wrote."""

    async def body() -> None:
        async with open_demo() as site:
            response = await site.complete(structured_outputs={"grammar": "start: <|nowhere|>"}, max_tokens=2)
            error = response.json()["error"]
            assert (response.status_code, error["param"]) == (400, "structured_outputs.grammar"), error
            assert error["message"].startswith("structured_outputs.grammar: ")

    run(body())


async def _answer(site: Any, gate: asyncio.Semaphore, schema: Any, model: str, seed: int) -> bool:
    """Whether it came to its end, in which case it is valid. Only recursion may go on for ever."""
    options = {"response_format": _format(schema), "temperature": 1.0, "seed": seed, "max_tokens": 400}
    async with gate:
        if seed % 2:
            choice = (await site.complete(model=model, prompt="Tell me about the owl.", **options)).json()["choices"][0]
            text = choice["text"]
        else:
            choice = (await site.chat(model=model, **options)).json()["choices"][0]
            text = choice["message"]["content"]
    if choice["finish_reason"] == "length":
        assert "$ref" in json.dumps(schema), text
        with pytest.raises(json.JSONDecodeError) as cut:
            json.loads(text)
        assert cut.value.pos >= len(text.rstrip()) - 16, "wrong before its end"
        return False
    jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker()).validate(json.loads(text))
    return True


@pytest.mark.parametrize("count", [50, pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_answers_at_temperature_one_all_match_across_adapters(open_demo: Callable[[], Any], count: int) -> None:
    async def body() -> None:
        gate = asyncio.Semaphore(32)
        async with open_demo() as site:
            for name, folder in ADAPTERS.items():
                assert (await site.upload(name, folder)).status_code == 201
            jobs = zip(islice(cycle(SCHEMAS), count), cycle(["base", *ADAPTERS]), range(count), strict=False)
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(_answer(site, gate, schema, model, seed)) for schema, model, seed in jobs]
            assert sum(task.result() for task in tasks) >= 0.95 * count

    asyncio.run(body())


def test_regexes_choices_and_grammars_hold_streamed_or_not(open_demo: Callable[[], Any]) -> None:
    date = 'start: day " " MONTH\nday: /[12][0-9]/\nMONTH: "May" | "June"'

    async def body() -> None:
        async with open_demo() as site:
            for asked, matches in (
                ({"choice": ["🦊 fox", "owl", "owl 🦉"]}, r"🦊 fox|owl|owl 🦉"),
                ({"regex": r"\d{3}-[a-f]{2}(é|ß)"}, r"\d{3}-[a-f]{2}(é|ß)"),
                ({"grammar": date}, r"[12][0-9] (May|June)"),
            ):
                for seed in range(6):
                    options = {"structured_outputs": asked, "temperature": 1, "seed": seed, "max_tokens": 60}
                    whole = (await site.complete(**options)).json()["choices"][0]
                    streamed = await site.complete(**options, stream=True)
                    lines = [line.removeprefix("data: ") for line in streamed.text.split("\n\n") if line]
                    pieces = [json.loads(line)["choices"][0] for line in lines[:-1]]
                    assert re.fullmatch(matches, whole["text"])
                    assert "".join(piece["text"] for piece in pieces) == whole["text"]
                    assert [whole["finish_reason"], pieces[-1]["finish_reason"]] == ["stop", "stop"]

    asyncio.run(body())

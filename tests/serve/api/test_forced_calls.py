"""Calls that are forced, or held to strict schemas, from a real engine over a random model: whatever it draws fits."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from tokenizers import AddedToken

from onebase.serve.api.tool_schemas import Function
from onebase.serve.api.tools.grammars import CallGrammars
from onebase.serve.api.tools.syntax import HERMES, LLAMA, MISTRAL, Syntax
from onebase.serve.engine.grammar import Vocabulary
from tests.serve.api.conftest import make_tokenizer

SCHEMAS: dict[str, dict[str, Any]] = {
    "weather": {
        "type": "object",
        "properties": {"city": {"enum": ["Köln", "Rom"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "nested": {
        "$defs": {"tag": {"type": "string", "maxLength": 4}},
        "type": "object",
        "properties": {"tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}, "maxItems": 2}},
        "required": ["tags"],
        "additionalProperties": False,
    },
}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": schema}} for name, schema in SCHEMAS.items()]
STRICT = [{"type": "function", "function": {**tool["function"], "strict": True}} for tool in TOOLS]
SHOWN = "{% if tools %}{{ tools | length }}MARK{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}"
NAMED = {"type": "function", "function": {"name": "nested"}}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool | None], Path]:
    """bases(marker, special): a random Llama whose template shows tools in the format of the marker, which is a token
    of its own unless special is None."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    def make(marker: str, special: bool | None) -> Path:
        folder = tmp_path_factory.mktemp("base")
        raw = make_tokenizer()
        raw.add_tokens([] if special is None else [AddedToken(marker, special=special)])
        fast = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
        fast.chat_template = SHOWN.replace("MARK", marker)
        fast.save_pretrained(folder)
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=304, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=512, bos_token_id=0, eos_token_id=1,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder)
        return folder

    return make


def check_call(call: dict[str, Any]) -> None:
    function = call["function"]
    jsonschema.validate(json.loads(function["arguments"]), SCHEMAS[function["name"]])


@pytest.mark.parametrize(
    ("marker", "special"),
    [
        ("<tool_call>", False),
        ("<tool_call>", True),
        ("<tool_call>", None),
        ("[TOOL_CALLS]", True),
        ("<|python_tag|>", True),
    ],
)
def test_every_forced_call_fits(run: Any, open_real: Any, bases: Any, marker: str, special: bool | None) -> None:
    async def body() -> None:
        async with open_real(model=str(bases(marker, special))) as site:
            for options in ({"tool_choice": "required"}, {"tool_choice": NAMED}, {"tool_choice": "required", "n": 3}):
                for stream in (False, True):
                    response = await site.chat(tools=TOOLS, seed=1, max_tokens=400, stream=stream, **options)
                    assert response.status_code == 200, response.text
                    for choice in whole(response, stream):
                        assert choice["calls"], choice
                        if choice["finish_reason"] == "length":
                            continue
                        assert choice["finish_reason"] == "tool_calls"
                        assert not choice["content"]
                        for call in choice["calls"]:
                            check_call(call)
                        if options["tool_choice"] == NAMED:
                            assert [call["function"]["name"] for call in choice["calls"]] == ["nested"]

    run(body())


GOOD = '{"name": "weather", "KEY": {"city": "Rom"}}'
BAD = '{"name": "weather", "KEY": {"city": "Bonn"}}'


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize(
    ("syntax", "before", "behind"),
    [
        (HERMES, "Hi {}\n<tool_call>\n", "\n</tool_call>"),
        (MISTRAL, "Hi [TOOL_CALLS] [", "]"),
        (LLAMA, "", ""),
        (LLAMA, "<|python_tag|>", "; " + GOOD.replace("KEY", "parameters")),
    ],
)
def test_free_text_may_hold_calls_that_fit(syntax: Syntax, before: str, behind: str, special: bool) -> None:
    raw = make_tokenizer()
    raw.add_tokens([AddedToken(mark, special=special) for mark in syntax.markers])
    ids = {mark: raw.token_to_id(mark) for mark in syntax.markers}
    functions = [Function(**tool["function"]) for tool in STRICT]
    vocabulary = Vocabulary(raw.to_str(), raw.get_vocab_size(), [1])

    def accepts(text: str, many: bool = True) -> bool:
        matcher = vocabulary.compile(CallGrammars(syntax, functions, ids, many=many).free())
        return all(map(matcher.accept, [*raw.encode(text).ids, 1]))

    good, bad = (call.replace("KEY", syntax.key) for call in (GOOD, BAD))
    assert accepts("Nothing to call.")
    assert accepts(before + good + behind)
    assert not accepts(before + bad + behind)
    assert accepts(f"{good}; {good}" if syntax.bare else before + good + behind)
    assert not syntax.bare or not accepts(f"{good}; {good}", many=False)


@pytest.mark.parametrize("syntax", [HERMES, MISTRAL, LLAMA])
def test_json_or_calls(syntax: Syntax) -> None:
    raw = make_tokenizer()
    raw.add_tokens([AddedToken(mark) for mark in syntax.markers])
    ids = {mark: raw.token_to_id(mark) for mark in syntax.markers}
    functions = [Function(**tool["function"]) for tool in TOOLS]
    vocabulary = Vocabulary(raw.to_str(), raw.get_vocab_size(), [1])
    grammar = CallGrammars(syntax, functions, ids, many=True).or_json('{"type": "object", "required": ["x"]}')

    def accepts(text: str) -> bool:
        matcher = vocabulary.compile(grammar)
        return all(map(matcher.accept, [*raw.encode(text).ids, 1]))

    call = GOOD.replace("KEY", syntax.key)
    written = {
        "hermes": f"<tool_call>\n{call}\n</tool_call>",
        "mistral": f"[TOOL_CALLS][{call}]",
        "llama": f"<|python_tag|>{call}",
    }
    assert accepts(written[syntax.name])
    assert accepts('{"x": 1}')
    assert not accepts('{"y": 1}')
    assert not accepts("Some text.")


def whole(response: Any, stream: bool) -> list[dict[str, Any]]:
    """content, calls and finish_reason of each choice."""
    if not stream:
        return [
            {"content": one["message"]["content"], "calls": one["message"].get("tool_calls", []), **one}
            for one in response.json()["choices"]
        ]
    found: dict[int, dict[str, Any]] = {}
    for line in response.text.split("\n\n")[:-2]:
        for one in json.loads(line.removeprefix("data: "))["choices"]:
            choice = found.setdefault(one["index"], {"content": "", "calls": [], "finish_reason": None})
            choice["content"] += one["delta"].get("content") or ""
            choice["finish_reason"] = one["finish_reason"]
            for piece in one["delta"].get("tool_calls", []):
                if "id" in piece:
                    choice["calls"].append({"function": dict(piece["function"])})
                else:
                    choice["calls"][piece["index"]]["function"]["arguments"] += piece["function"]["arguments"]
    return list(found.values())


@pytest.mark.parametrize("strict", [False, True])
def test_schemas_that_cannot_be_enforced(run: Any, open_site: Any, engine: Any, strict: bool) -> None:
    engine.details = replace(engine.details, max_model_len=4096)

    async def body() -> None:
        async with open_site() as site:
            odd = {"type": "object", "properties": {"a": {"type": "string"}}, "propertyNames": {"pattern": "^a"}}
            tool = {"type": "function", "function": {"name": "f", "parameters": odd, "strict": strict}}
            response = await site.chat(tools=[tool], tool_choice="required", max_tokens=1)
            assert (response.json().get("error", {}).get("param") == "tools.0.function.parameters") is strict, (
                response.text
            )

    run(body())

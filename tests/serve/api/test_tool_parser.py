"""Calls in what models write: streamed or not, cut in whatever way, the same comes out and nothing is lost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onebase.serve.api.tools.parser import ToolParser
from onebase.serve.api.tools.syntax import HERMES, LLAMA, MISTRAL, Syntax, syntax_of

Told = list[tuple[str, ...]]


def read(syntax: Syntax, pieces: Sequence[str], **options: Any) -> Told:
    """("text",) and (name, arguments), in order."""
    parser = ToolParser(syntax, {"f", "g"}, **options)
    parts = [part for piece in pieces for part in parser.push(piece)] + parser.finish()
    told: Told = []
    for part in parts:
        if isinstance(part, str):
            told = [*told[:-1], (told[-1][0] + part,)] if told and len(told[-1]) == 1 else [*told, (part,)]
        elif part.name:
            assert part.id
            assert part.index == sum(len(one) == 2 for one in told)
            told.append((part.name, part.arguments))
        else:
            assert not part.id
            told[-1] = (told[-1][0], told[-1][1] + part.arguments)
    return told


@pytest.mark.parametrize(
    ("syntax", "text", "expected"),
    [
        (HERMES, "plain text ", [("plain text ",)]),
        (HERMES, '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', [("f", '{"a": 1}')]),
        (
            HERMES,
            'Let me see.\n<tool_call>\n{"name": "f", "arguments": {"a": "</tool_call> }{ \\" ]"}}\n</tool_call>\n'
            '<tool_call>{"name":"g"}</tool_call>\nDone.\n',
            [("Let me see.",), ("f", '{"a": "</tool_call> }{ \\" ]"}'), ("g", "{}"), ("Done.\n",)],
        ),
        (HERMES, '<tool_call>{"arguments": {"x": 1}, "name": "f"}</tool_call>', [("f", '{"x": 1}')]),
        (HERMES, '<tool_call>{"name": "f", "arguments": "{\\"x\\": 1}"}', [("f", '{"x": 1}')]),
        (HERMES, '<tool_call>{"name": "f", "arguments": {"a": tru}}</tool_call>', [("f", '{"a": tru}')]),
        (HERMES, '<tool_call>{"name": "f", "arguments": {"a": [1,', [("f", '{"a": [1,')]),
        (MISTRAL, '[TOOL_CALLS] [{"name": "f", "arguments": {}, "id": "abcdefghi"}, {"name": "g", "arguments": {}}]',
         [("f", "{}"), ("g", "{}")]),
        (MISTRAL, 'ok[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g[CALL_ID]abc[ARGS]{"b": [{}]}',
         [("ok",), ("f", '{"a": 1}'), ("g", '{"b": [{}]}')]),
        (LLAMA, '{"name": "f", "parameters": {"a": 1}}; {"name": "g", "parameters": {}}',
         [("f", '{"a": 1}'), ("g", "{}")]),
        (LLAMA, '<|python_tag|>{"name": "f", "parameters": {"a": 1}}', [("f", '{"a": 1}')]),
        (LLAMA, 'See {"name": "f", "parameters": {}}', [('See {"name": "f", "parameters": {}}',)]),
    ],
)  # fmt: skip
def test_formats(syntax: Syntax, text: str, expected: Told) -> None:
    assert read(syntax, [text]) == expected
    assert read(syntax, list(text)) == expected


@pytest.mark.parametrize(
    ("syntax", "text"),
    [
        (HERMES, '<tool_call>\n{"name": "unknown", "arguments": {}}\n</tool_call>'),
        (HERMES, "<tool_call>not JSON</tool_call>"),
        (HERMES, '<tool_call>{"name": "f", "arguments": [1]}</tool_call> and more'),
        (HERMES, '<tool_call>{"name": "f", "na'),
        (HERMES, '<tool_call>{"name": ["f"], "arguments": {}}</tool_call>'),
        (HERMES, '<tool_call>{"arguments": {}, "name": {"f": 1}}</tool_call>'),
        (HERMES, " a < b <tool"),
        (HERMES, '<tool_call>{"name": "f", "name": "g"}</tool_call>'),
        (MISTRAL, "[TOOL_CALLS] [] "),
        (MISTRAL, "[TOOL_CALLS]h[ARGS]{}"),
        (LLAMA, '{"city": {"name": "f"}} is JSON too'),
        (LLAMA, "  \n"),
    ],
)
def test_what_is_no_call_comes_back_as_text(syntax: Syntax, text: str) -> None:
    assert read(syntax, [text]) == read(syntax, list(text)) == [(text,)]


FRAGMENTS = [
    "<tool_call>", "</tool_call>", '{"name": "f", "arguments": {', '{"name":"g"}', "[TOOL_CALLS]", "f[ARGS]{",
    "<|python_tag|>", "}", "}}", '"', " ", "\n", "[", "]", "{", ";", ",", "\\", "x", "<tool", "é",
]  # fmt: skip


@settings(max_examples=600, deadline=None)
@given(st.sampled_from([HERMES, LLAMA, MISTRAL]), st.lists(st.sampled_from(FRAGMENTS), max_size=14), st.data())
def test_any_cut_gives_the_same(syntax: Syntax, fragments: list[str], data: st.DataObject) -> None:
    text = "".join(fragments)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert read(syntax, pieces) == read(syntax, [text]) == read(syntax, list(text))


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.sampled_from("<tool_cal>[TOOL_CALLS] \n{}é"), max_size=60))
def test_text_without_calls_is_untouched(text: str) -> None:
    for syntax in (HERMES, MISTRAL, LLAMA):
        assert "".join(one[0] for one in read(syntax, list(text))) == text


def test_one_call_only() -> None:
    text = '<tool_call>{"name": "f", "arguments": {}}</tool_call><tool_call>{"name": "g", "arguments": {}}</tool_call>'
    assert read(HERMES, [text], most=1) == read(HERMES, list(text), most=1) == [("f", "{}")]


def test_the_prompt_may_have_the_opening() -> None:
    assert read(HERMES, list('{"name": "f", "arguments": {"a": 1}}'), opened=True) == [("f", '{"a": 1}')]
    assert read(MISTRAL, list('[{"name": "f", "arguments": {}}]'), opened=True) == [("f", "{}")]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", None),
        ("A text about tools and <tool_call>: {{ messages }}", None),
        ("{%- if tools %}<tools>{{ tools | tojson }}</tools> <tool_call>{%- endif %}", HERMES),
        ("{%- if tools is not none %}{{ tools }}{% endif %}<tool_call><function=", None),
        ("{%- if tools is not none %}[AVAILABLE_TOOLS]{{ tools }}{% endif %}[TOOL_CALLS]", MISTRAL),
        ('{%- for t in tools %}{{ t }}{% endfor %}{"name": x, "parameters": y}', LLAMA),
        ("{%- if custom_tools %}{% set tools = custom_tools %}{% endif %}<|python_tag|>", LLAMA),
    ],
)
def test_the_template_tells_the_format(template: str, expected: Syntax | None) -> None:
    assert syntax_of(template) == expected

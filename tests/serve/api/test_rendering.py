"""Templates are programs from strangers: what they may cost, and that they write what transformers writes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from onebase.serve.api import rendering
from onebase.serve.api.rendering import Renderer, TemplateFailed

HERMES = (
    "{%- if tools %}{{- '<|im_start|>system\\n' }}{%- if messages[0].role == 'system' %}{{- messages[0].content }}"
    "{%- endif %}{{- '<tools>' }}{%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}"
    "{{- '</tools><|im_end|>\\n' }}{%- endif %}\n"
    "{% for message in messages %}\n    {%- if message.role == 'skip' %}{% continue %}{% endif %}\n"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content }}\n"
    "{%- if message.tool_calls %}{%- for call in message.tool_calls %}"
    '{{- \'<tool_call>\\n{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{{- call.function.arguments | tojson }}{{- '}\\n</tool_call>' }}{%- endfor %}{%- endif %}"
    "{% generation %}{{- '<|im_end|>\\n' }}{% endgeneration %}\n{% endfor %}"
    "{%- if add_generation_prompt %}{{- bos_token + '<|im_start|>assistant\\n' }}{%- endif %}"
)
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"city": "Zürich <b>", "n": [1, None]}}}
MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "<html> & 'quotes' é 😀"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "3", "tool_call_id": "1"},
    {"role": "skip", "content": "x"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def renderer() -> Iterator[Renderer]:
    made = Renderer(cpu_seconds=0.5)
    yield made
    made.close()


@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("open_turn", [True, False])
def test_it_writes_what_transformers_writes(renderer: Renderer, tokenizer: Any, tools: Any, open_turn: bool) -> None:
    from transformers import PreTrainedTokenizerFast

    fast: Any = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")
    expected = fast.apply_chat_template(
        MESSAGES, tools=tools, chat_template=HERMES, add_generation_prompt=open_turn, tokenize=False
    )
    context = {"messages": MESSAGES, "tools": tools, "add_generation_prompt": open_turn, "bos_token": "<s>"}
    assert renderer.run(HERMES, context, 10_000) == expected


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "processor time"),
        ("{{ 9**(9**9) }}", "processor time"),
        ("{{ 'a' * 10**10 }}", "memory"),
        ("{{ '%9999999999d' | format(1) }}", "memory"),
        ("{% for i in range(1000) %}{{ 'a' * 1000 }}{% endfor %}", "more than 10000 characters"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "nests too deeply"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ raise_exception('no roles') }}", "no roles"),
        ("{% if", "unexpected end of template"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ '\\ud800' }}", "surrogate"),
    ],
)
def test_what_a_template_may_not_do(renderer: Renderer, template: str, reason: str) -> None:
    with pytest.raises(TemplateFailed) as failed:
        renderer.run(template, {"messages": []}, 10_000)
    assert reason.replace("'", "") in str(failed.value).replace("'", "")
    assert renderer.run("still {{ x }}", {"x": "here"}, 100) == "still here"


def test_a_template_that_is_slow_again_and_again_is_not_tried_any_more() -> None:
    renderer = Renderer(cpu_seconds=0.1, patience=2)
    endless = "{% for i in range(x) %}{% for j in range(x) %}{% endfor %}{% endfor %}"
    try:
        for size, reason in ((99999, "takes"), (1, ""), (99999, "takes"), (99999, "takes"), (1, "too often")):
            if reason:
                with pytest.raises(TemplateFailed, match=reason):
                    renderer.run(endless, {"x": size}, 100)
            else:
                assert renderer.run(endless, {"x": size}, 100) == ""
        assert renderer.run("another", {}, 100) == "another"
    finally:
        renderer.close()


def test_a_template_is_compiled_only_to_check_it(renderer: Renderer) -> None:
    assert renderer.run("{{ raise_exception('x') }}", None, 0) == ""
    with pytest.raises(TemplateFailed, match="unknown tag"):
        renderer.run("{% nope %}", None, 0)


DYING = """
import os, signal, sys
sys.stdin.readline()
print('{"text": "half', end="", flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("deaths", [1, 2])
def test_a_process_that_is_killed_within_its_answer_is_asked_again_once(
    monkeypatch: pytest.MonkeyPatch, deaths: int
) -> None:
    start, left = rendering._start, [None] * deaths

    def starting() -> subprocess.Popen[bytes]:
        if not left:
            return start()
        left.pop()
        return subprocess.Popen([sys.executable, "-c", DYING], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    monkeypatch.setattr(rendering, "_start", starting)
    renderer = Renderer(patience=1)
    try:
        if deaths > 1:
            with pytest.raises(TemplateFailed, match="ended"):
                renderer.run("whole", {}, 100)
        assert renderer.run("whole", {}, 100) == "whole", "nor is it held against the template"
    finally:
        renderer.close()

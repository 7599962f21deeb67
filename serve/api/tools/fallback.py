"""Tools in words, for models whose chat template knows none: described in the system message, in Hermes' format.

It is the format that most models with tools were trained on, and one that others follow when they are told to.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from onebase.serve.api.conversation import Conversation, Turn

_INTRODUCTION = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{functions}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


def in_words(conversation: Conversation) -> Conversation:
    """Without tools, calls and tool messages: all of them as text."""
    turns = _merged([_as_text(turn) for turn in conversation.messages])
    if conversation.tools:
        turns = _introduced(turns, conversation.tools)
    return replace(conversation, messages=turns, tools=())


def _as_text(turn: Turn) -> Turn:
    if turn["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{turn['content']}\n</tool_response>", "is_result": True}
    if "tool_calls" not in turn:
        return turn
    calls = [f"<tool_call>\n{_call(call['function'])}\n</tool_call>" for call in turn["tool_calls"]]
    text = "\n".join([*([turn["content"]] if turn["content"] else []), *calls])
    return {**{key: value for key, value in turn.items() if key != "tool_calls"}, "content": text}


def _call(function: Mapping[str, Any]) -> str:
    return json.dumps({"name": function["name"], "arguments": function["arguments"]}, ensure_ascii=False)


def _merged(turns: Sequence[Turn]) -> list[Turn]:
    """Results that follow each other, and what the user says behind them, are one turn: many templates want user and
    assistant in alternation."""
    merged: list[Turn] = []
    after_result = False
    for turn in turns:
        is_result = "is_result" in turn
        plain = {key: value for key, value in turn.items() if key != "is_result"}
        if after_result and turn["role"] == "user":
            merged[-1] = {**merged[-1], "content": f"{merged[-1]['content']}\n{plain['content']}"}
        else:
            merged.append(plain)
        after_result = is_result
    return merged


def _introduced(turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]]) -> list[Turn]:
    functions = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    introduction = _INTRODUCTION.format(functions=functions)
    if turns[0]["role"] != "system":
        return [{"role": "system", "content": introduction}, *turns]
    return [{**turns[0], "content": f"{turns[0]['content']}\n\n{introduction}"}, *turns[1:]]

"""The items of a Responses request, and the chat messages that they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, JsonValue, Tag

from onebase.serve.api.chat_messages import MAX_PARTS, CallId, FunctionName
from onebase.serve.api.schemas import Label, Supported


class InputText(Supported):
    type: Literal["input_text"]
    text: str


class OutputText(Supported):
    """What an earlier answer said. Its annotations and log-probabilities may be sent along."""

    not_yet: ClassVar[Mapping[str, tuple[JsonValue, ...]]] = {"annotations": ([],)}

    type: Literal["output_text"]
    text: str
    logprobs: list[JsonValue] | None = None


class Refusal(Supported):
    type: Literal["refusal"]
    refusal: str


Part = Annotated[InputText | OutputText | Refusal, Field(discriminator="type")]
Parts = Annotated[list[Part], Field(min_length=1, max_length=MAX_PARTS)]


class MessageItem(Supported):
    not_yet: ClassVar[Mapping[str, tuple[JsonValue, ...]]] = {"phase": ("commentary", "final_answer")}

    type: Literal["message"] = "message"
    id: Label | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Parts
    status: Literal["in_progress", "completed", "incomplete"] | None = None


class CallItem(Supported):
    not_yet: ClassVar[Mapping[str, tuple[JsonValue, ...]]] = {"async": (False,), "caller": (), "namespace": ()}

    type: Literal["function_call"]
    id: Label | None = None
    call_id: CallId
    name: FunctionName
    arguments: str
    status: Literal["in_progress", "completed", "incomplete"] | None = None


class ResultItem(Supported):
    not_yet: ClassVar[Mapping[str, tuple[JsonValue, ...]]] = {"caller": ()}

    type: Literal["function_call_output"]
    id: Label | None = None
    call_id: CallId
    output: str | Annotated[list[InputText], Field(min_length=1, max_length=MAX_PARTS)]
    status: Literal["in_progress", "completed", "incomplete"] | None = None


def type_of(item: Any) -> Any:
    """An item without a type is a message, and so is, for its error, what is no item."""
    if isinstance(item, Mapping):
        return item.get("type") or "message"
    return getattr(item, "type", "message")


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[ResultItem, Tag("function_call_output")],
    Discriminator(type_of),
]


def as_messages(items: str | Sequence[MessageItem | CallItem | ResultItem]) -> list[dict[str, Any]]:
    """In chat's form. Calls that follow each other, or what the assistant said, are one message of the assistant."""
    if isinstance(items, str):
        return [{"role": "user", "content": items}]
    messages: list[dict[str, Any]] = []
    for item in items:
        if isinstance(item, ResultItem):
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)})
        elif isinstance(item, MessageItem):
            messages.append({"role": item.role, "content": _text(item.content)})
        else:
            _assistant(messages)["tool_calls"].append(_call(item))
    return messages


def _assistant(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """The last message, where it is the assistant's; else a new one."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": None})
    messages[-1].setdefault("tool_calls", [])
    return messages[-1]


def _call(item: CallItem) -> dict[str, Any]:
    return {"id": item.call_id, "type": "function", "function": {"name": item.name, "arguments": item.arguments}}


def _text(content: str | Sequence[InputText | OutputText | Refusal]) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(part.refusal if isinstance(part, Refusal) else part.text for part in content)

"""The messages of a chat: what each role may say, and which tool message answers which call."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, JsonValue, StringConstraints

from onebase.serve.api.conversation import call_arguments
from onebase.serve.api.errors import bad_request
from onebase.serve.api.schemas import Body, Label, Supported

MAX_PARTS = 1024
MAX_CALLS = 128
FunctionName = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
CallId = Annotated[str, StringConstraints(min_length=1, max_length=256)]


class TextPart(Body):
    type: Literal["text"]
    text: str


class RefusalPart(Body):
    type: Literal["refusal"]
    refusal: str


Texts = str | Annotated[list[TextPart], Field(min_length=1, max_length=MAX_PARTS)]


class Message(Supported):
    """What all roles share."""

    name: Label | None = None

    def for_template(self) -> dict[str, Any]:
        message = {"role": self.spoken, "content": self.text}
        return message if self.name is None else {**message, "name": self.name}

    @property
    @abstractmethod
    def spoken(self) -> str:
        """The role as templates know it."""

    @property
    @abstractmethod
    def text(self) -> str:
        """What is said, as one string."""


class SystemMessage(Message):
    """``developer`` is what newer clients call ``system``."""

    role: Literal["system", "developer"]
    content: Texts

    @property
    def spoken(self) -> str:
        return "system"

    @property
    def text(self) -> str:
        return joined(self.content)


class UserMessage(Message):
    role: Literal["user"]
    content: Texts

    @property
    def spoken(self) -> str:
        return "user"

    @property
    def text(self) -> str:
        return joined(self.content)


class CalledFunction(Body):
    """arguments: JSON, as the model wrote it."""

    name: FunctionName
    arguments: str


class ToolCall(Body):
    id: CallId
    type: Literal["function"]
    function: CalledFunction

    def for_template(self) -> dict[str, Any]:
        function = {"name": self.function.name, "arguments": call_arguments(self.function.arguments)}
        return {"id": self.id, "type": "function", "function": function}


class AssistantMessage(Message):
    """``content`` may be left out where there are calls, or a refusal."""

    not_yet: ClassVar[Mapping[str, tuple[JsonValue, ...]]] = {
        "function_call": (),
        "audio": (),
        "annotations": ([],),
        "reasoning": ("",),
        "reasoning_content": ("",),
    }

    role: Literal["assistant"]
    content: str | Annotated[list[TextPart | RefusalPart], Field(min_length=1, max_length=MAX_PARTS)] | None = None
    refusal: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_CALLS)] | None = None

    def for_template(self) -> dict[str, Any]:
        message = Message.for_template(self)
        if not self.tool_calls:
            return message
        return {**message, "tool_calls": [call.for_template() for call in self.tool_calls]}

    @property
    def spoken(self) -> str:
        return "assistant"

    @property
    def text(self) -> str:
        if self.content is None:
            return self.refusal or ""
        return joined(self.content)

    @property
    def says_nothing(self) -> bool:
        return self.content is None and self.refusal is None and not self.tool_calls


class ToolMessage(Message):
    """The result of a call. ``name``: of its function, for templates that show it."""

    role: Literal["tool"]
    content: Texts
    tool_call_id: CallId

    def for_template(self) -> dict[str, Any]:
        return {**Message.for_template(self), "tool_call_id": self.tool_call_id}

    @property
    def spoken(self) -> str:
        return "tool"

    @property
    def text(self) -> str:
        return joined(self.content)


ChatMessage = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


def joined(content: str | Sequence[TextPart | RefusalPart]) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(part.text if isinstance(part, TextPart) else part.refusal for part in content)


def check_turns(messages: Sequence[Message]) -> None:
    """Each call is answered by a tool message, right after it and once; no other is there. Raises ApiError 400."""
    asked: dict[str, int] = {}  # call ids without an answer -> the message that made them
    for index, message in enumerate(messages):
        if isinstance(message, ToolMessage):
            if asked.pop(message.tool_call_id, None) is None:
                raise _no_such_call(index, message.tool_call_id)
            continue
        _check_answered(asked)
        if isinstance(message, AssistantMessage):
            asked = _calls_of(index, message)
    _check_answered(asked)


def _calls_of(index: int, message: AssistantMessage) -> dict[str, int]:
    if message.says_nothing:
        field = f"messages.{index}.content"
        raise bad_request(f"{field}: this field is required, unless there are tool_calls.", field)
    calls = message.tool_calls or ()
    if len({call.id for call in calls}) < len(calls):
        field = f"messages.{index}.tool_calls"
        raise bad_request(f"{field}: two calls have one id.", field)
    return {call.id: index for call in calls}


def _no_such_call(index: int, call: str) -> Exception:
    field = f"messages.{index}.tool_call_id"
    return bad_request(f"{field}: no call {call!r} waits for its result here.", field)


def _check_answered(asked: Mapping[str, int]) -> None:
    for call, index in asked.items():
        field = f"messages.{index}.tool_calls"
        raise bad_request(f"{field}: tool messages must follow with the results; {call!r} has none.", field)

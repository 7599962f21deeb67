"""What a chat template gets to see of a request."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from onebase.adapters.strict_json import JsonError, parse_strict
from onebase.serve.api.errors import bad_request

Turn = Mapping[str, Any]

_MARK = "CONTINUE_FINAL_MESSAGE_TAG "


@dataclass(frozen=True, slots=True)
class Conversation:
    """messages, tools: as templates expect them, with the arguments of calls as objects. open_turn: the template opens
    the assistant's turn. continues: the last message is left open instead, for the answer to go on with it. special:
    the tokenizer adds its special tokens, besides those of the template. tail: text that the answer starts with.
    """

    messages: Sequence[Turn]
    tools: Sequence[Mapping[str, Any]] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    open_turn: bool = True
    continues: bool = False
    special: bool = False
    tail: str = ""

    @property
    def is_plain(self) -> bool:
        """Texts alone: their length is known at once."""
        texts = all(isinstance(value, str | None) for message in self.messages for value in message.values())
        return texts and not self.tools and not self.kwargs

    def exceeds(self, characters: int) -> bool:
        """Whether all texts and values together are longer: what rendering and tokenising cost. Counts no further."""
        return longer_than([message.values() for message in self.messages] + [self.tools, self.kwargs], characters)

    def context(self, specials: Mapping[str, str]) -> dict[str, Any]:
        """The template's variables. specials: ``bos_token`` and the like."""
        return {
            **specials,
            **self.kwargs,
            "messages": _marked(self.messages) if self.continues else self.messages,
            "tools": self.tools or None,
            "documents": None,
            "add_generation_prompt": self.open_turn,
        }

    def finish(self, text: str) -> str:
        """The rendered text as the prompt. Raises ApiError 400 where the template does not show the message to go on
        with."""
        return (_cut(text) if self.continues else text) + self.tail


def call_arguments(text: str) -> Any:
    """Of a call in the conversation so far, as an object; the text itself where it is none."""
    try:
        value = parse_strict(text)
    except JsonError:
        return text
    return value if isinstance(value, dict) else text


def _marked(messages: Sequence[Turn]) -> list[Turn]:
    """With a mark at the end of the last message, as transformers finds it again."""
    last = messages[-1]
    return [*messages[:-1], {**last, "content": last["content"] + _MARK}]


def _cut(text: str) -> str:
    """Cut at the mark. A template that strips messages strips the one to go on with, too."""
    at = text.rfind(_MARK.rstrip())
    if at < 0:
        raise bad_request(
            "continue_final_message: the chat template does not write the last message.", "continue_final_message"
        )
    return text[:at] if text.startswith(_MARK, at) else text[:at].rstrip()


def longer_than(value: Any, characters: int) -> bool:
    """Whether it has more, about as JSON counts: each value, key and bracket one at least. In Python, so that other
    threads get on meanwhile, and no further than that."""
    rest, pending = characters, [value]
    while pending and rest >= 0:
        one = pending.pop()
        rest -= _size(one)
        if isinstance(one, Mapping):
            pending += [*one.keys(), *one.values()]
        elif isinstance(one, Iterable) and not isinstance(one, str):
            pending += one
    return rest < 0


def _size(value: Any) -> int:
    """Of a text its length, of a whole number about its digits."""
    if isinstance(value, str):
        return len(value)
    return 1 + value.bit_length() // 4 if isinstance(value, int) else 1

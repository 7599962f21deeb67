"""The body of chat completions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field, JsonValue, model_validator

from onebase.serve.api.chat_messages import AssistantMessage, ChatMessage, check_turns
from onebase.serve.api.conversation import Conversation, longer_than
from onebase.serve.api.errors import bad_request
from onebase.serve.api.generation_schemas import NEUTRAL_EVERYWHERE, Generation
from onebase.serve.api.schemas import (
    MAX_MESSAGES,
    MAX_TOKENS,
    Body,
    Label,
    NumLogprobs,
)
from onebase.serve.api.tool_schemas import Function, NamedChoice, ToolChoice, Tools, check_choice, check_tools

MAX_KWARGS_CHARS = 16 << 10
_TAKEN = frozenset(
    {
        "messages", "conversation", "tools", "documents", "add_generation_prompt", "continue_final_message",
        "chat_template", "tokenize", "bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token",
        "mask_token", "raise_exception", "strftime_now",
    }
)  # fmt: skip


class Rendered(Body):
    """What says how messages become a prompt: of chat requests, and of /tokenize.

    add_generation_prompt: true, unless the last message is to be continued.
    """

    chat_template_kwargs: dict[Label, JsonValue] = Field(default={}, max_length=32)
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False

    @property
    def opens_turn(self) -> bool:
        return not self.continue_final_message if self.add_generation_prompt is None else self.add_generation_prompt

    @model_validator(mode="after")
    def _kwargs_are_free(self) -> Rendered:
        taken = sorted(self.chat_template_kwargs.keys() & _TAKEN)
        if taken:
            raise bad_request(
                f"chat_template_kwargs.{taken[0]}: the server sets this variable.", f"chat_template_kwargs.{taken[0]}"
            )
        if longer_than(self.chat_template_kwargs, MAX_KWARGS_CHARS):
            raise bad_request(
                f"chat_template_kwargs: at most {MAX_KWARGS_CHARS} characters of JSON.", "chat_template_kwargs"
            )
        return self


def check_continued(body: Rendered, messages: list[ChatMessage]) -> None:
    """Raises ApiError 400."""
    if not body.continue_final_message:
        return
    if body.opens_turn:
        raise bad_request(
            "continue_final_message and add_generation_prompt exclude each other: set one of them to false.",
            "continue_final_message",
        )
    last = messages[-1]
    if not isinstance(last, AssistantMessage) or not last.text.strip() or last.tool_calls:
        raise bad_request(
            "continue_final_message: the last message must be the assistant's, with text and without tool_calls.",
            "continue_final_message",
        )


class ChatRequest(Generation, Rendered):
    """POST /v1/chat/completions."""

    prompt_field: ClassVar[str] = "messages"

    not_yet: ClassVar[Mapping[str, tuple[JsonValue, ...]]] = {
        **NEUTRAL_EVERYWHERE,
        "functions": ([],),
        "function_call": ("none",),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "reasoning_effort": (),
        "include_reasoning": (False,),
        "verbosity": (),
        "web_search_options": (),
        "chat_template": (),
        "documents": ([],),
    }

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=MAX_TOKENS)
    logprobs: bool | None = None
    top_logprobs: NumLogprobs | None = None
    prompt_logprobs: NumLogprobs | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    add_special_tokens: bool = False

    @model_validator(mode="after")
    def _alternatives_need_logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise bad_request("top_logprobs is only allowed where logprobs is true.", "top_logprobs")
        return self

    @model_validator(mode="after")
    def _prompt_logprobs_are_not_streamed(self) -> ChatRequest:
        if self.stream and self.prompt_logprobs is not None:
            raise bad_request("prompt_logprobs is not allowed where stream is true.", "prompt_logprobs")
        return self

    @model_validator(mode="after")
    def _one_limit(self) -> ChatRequest:
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise bad_request("max_tokens and max_completion_tokens differ: give one.", "max_tokens")
        return self

    @model_validator(mode="after")
    def _turns_fit(self) -> ChatRequest:
        check_turns(self.messages)
        check_continued(self, self.messages)
        return self

    @model_validator(mode="after")
    def _tools_fit(self) -> ChatRequest:
        check_tools(self.functions, "tools.{}.function")
        named = self.tool_choice.function.name if isinstance(self.tool_choice, NamedChoice) else None
        check_choice(named, self.functions, self.tool_choice not in (None, "none"), "tool_choice")
        return self

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def num_prompt_logprobs(self) -> int | None:
        return self.prompt_logprobs

    @property
    def token_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def functions(self) -> tuple[Function, ...]:
        return tuple(tool.function for tool in self.tools or ())

    @property
    def conversation(self) -> Conversation:
        """Of the messages alone: tools are added by those who know the template."""
        return Conversation(
            messages=[message.for_template() for message in self.messages],
            kwargs=self.chat_template_kwargs,
            open_turn=self.opens_turn,
            continues=self.continue_final_message,
            special=self.add_special_tokens,
        )

"""Bodies of the tokenizer routes."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from onebase.serve.api.chat_messages import ChatMessage, check_turns
from onebase.serve.api.chat_schemas import Rendered, check_continued
from onebase.serve.api.conversation import Conversation
from onebase.serve.api.errors import bad_request
from onebase.serve.api.query import Query
from onebase.serve.api.schemas import MAX_MESSAGES, MAX_TOKENS, Body, ModelName, TokenId
from onebase.serve.api.tool_schemas import Function, Tools, check_tools


class TokenizeRequest(Rendered):
    """POST /tokenize: ``prompt``, or ``messages`` through the chat template, with ``tools`` where there are any."""

    model: ModelName | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: bool | None = None
    tools: Tools | None = None
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_source(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise bad_request("Give either prompt or messages.", "prompt")
        check_tools(self.functions, "tools.{}.function")
        if self.messages is not None:
            check_turns(self.messages)
            check_continued(self, self.messages)
        return self

    @property
    def functions(self) -> tuple[Function, ...]:
        return tuple(tool.function for tool in self.tools or ())

    @property
    def conversation(self) -> Conversation:
        """Of the messages, with the tools."""
        return Conversation(
            messages=[message.for_template() for message in self.messages or ()],
            tools=[function.for_template() for function in self.functions],
            kwargs=self.chat_template_kwargs,
            open_turn=self.opens_turn,
            continues=self.continue_final_message,
            special=self.add_special_tokens is True,
        )


class DetokenizeRequest(Body):
    """POST /detokenize."""

    model: ModelName | None = None
    tokens: Annotated[list[TokenId], Field(max_length=MAX_TOKENS, fail_fast=True)]


class TokenizerQuery(Query):
    """Whose tokenizer; without a name it is the base's."""

    model: ModelName | None = None

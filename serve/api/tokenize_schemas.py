"""Bodies of the tokenizer routes."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from onebase.serve.api.chat_schemas import ChatMessage
from onebase.serve.api.errors import bad_request
from onebase.serve.api.schemas import MAX_MESSAGES, MAX_TOKENS, Body, ModelName, TokenId


class TokenizeRequest(Body):
    """POST /tokenize: ``prompt``, or ``messages`` through the chat template."""

    model: ModelName | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_source(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise bad_request("Give either prompt or messages.", "prompt")
        return self


class DetokenizeRequest(Body):
    """POST /detokenize."""

    model: ModelName | None = None
    tokens: Annotated[list[TokenId], Field(max_length=MAX_TOKENS, fail_fast=True)]

"""What answers look like, for the OpenAPI document alone: answers are written as JSON by hand, on the hot path.

tests/serve/api/test_openapi_document.py holds both together.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

FinishReason = Annotated[str, Field(description="stop, length, or what ended the choice.")]


class Answer(BaseModel):
    """No field but these."""

    model_config = ConfigDict(extra="forbid")


class Fault(Answer):
    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: str | None
    code: str | None


class ErrorAnswer(Answer):
    """Every answer that is not 2xx, and the last line of a stream that failed."""

    error: Fault


class CachedTokens(Answer):
    cached_tokens: int


class UsageAnswer(Answer):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class LegacyLogprobs(Answer):
    """Of completions: one value for each token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Answer):
    index: int
    text: str
    logprobs: LegacyLogprobs | None
    finish_reason: FinishReason
    prompt_logprobs: list[dict[str, Any] | None] | None = None


class Completion(Answer):
    """POST /v1/completions, not streamed."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: UsageAnswer


class ChatLogprobs(Answer):
    content: list[dict[str, Any]]
    refusal: None


class CalledByName(Answer):
    """arguments: JSON as text."""

    name: str
    arguments: str


class Call(Answer):
    id: str
    type: Literal["function"]
    function: CalledByName


class Reply(Answer):
    """content is null where the model only calls tools."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[Call] | None = None


class ChatChoice(Answer):
    index: int
    message: Reply
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    prompt_logprobs: list[dict[str, Any] | None] | None = None


class ChatCompletion(Answer):
    """POST /v1/chat/completions, not streamed."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: UsageAnswer


class ClassAnswer(Answer):
    """Of a text; ``tokens`` has the same for each token in its place where the head is a token classifier's."""

    index: int
    num_classes: int
    label: str | None = None
    probs: list[float] | None = None
    tokens: list[ClassAnswer] | None = None


class Classification(Answer):
    """POST /v1/classify."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[ClassAnswer]
    usage: UsageAnswer


class Embedding(Answer):
    """embedding: numbers, or base64 of little-endian float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Embeddings(Answer):
    """POST /v1/embeddings."""

    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: UsageAnswer


class Tokens(Answer):
    """POST /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Text(Answer):
    """POST /detokenize."""

    prompt: str


class TokenizerInfo(BaseModel):
    """GET /tokenizer_info; further special tokens by name."""

    tokenizer_class: str
    vocab_size: int
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    chat_template: str | None


class Model(Answer):
    """parent: the base, of an adapter."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int


class Models(Answer):
    """GET /v1/models: ``next`` is the following page's ``after``."""

    object: Literal["list"]
    data: list[Model]
    has_more: bool
    next: str | None


class Status(Answer):
    status: str


class Version(Answer):
    version: str

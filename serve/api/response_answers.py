"""What /v1/responses answers, for the OpenAPI document alone. A test compares it with what OpenAI answers."""

from __future__ import annotations

from typing import Any, Literal

from onebase.serve.api.answer_schemas import Answer

Progress = Literal["in_progress", "completed", "incomplete"]


class SaidText(Answer):
    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[dict[str, Any]]


class SaidMessage(Answer):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: Progress
    content: list[SaidText]


class SaidCall(Answer):
    """arguments: JSON as text."""

    id: str
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    status: Progress


class CachedInput(Answer):
    cached_tokens: int
    cache_write_tokens: int


class OutputDetails(Answer):
    reasoning_tokens: int


class ResponseUsage(Answer):
    input_tokens: int
    input_tokens_details: CachedInput
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class ResponseAnswer(Answer):
    """POST /v1/responses, not streamed."""

    id: str
    object: Literal["response"]
    created_at: float
    completed_at: float | None
    status: Literal["completed", "incomplete"]
    model: str
    error: None
    incomplete_details: dict[str, str] | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    output: list[SaidMessage | SaidCall]
    parallel_tool_calls: bool
    previous_response_id: None
    service_tier: Literal["default"]
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"]
    usage: ResponseUsage
    user: str | None

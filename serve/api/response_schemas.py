"""The body of /v1/responses, and the chat request that it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, JsonValue, ValidationError, model_validator

from onebase.serve.api.chat_messages import FunctionName
from onebase.serve.api.chat_schemas import ChatRequest
from onebase.serve.api.errors import ApiError, bad_request, from_validation
from onebase.serve.api.response_items import Item, as_messages
from onebase.serve.api.schemas import (
    MAX_ADAPTERS,
    MAX_MESSAGES,
    MAX_TOKENS,
    AdapterScale,
    Label,
    ModelName,
    NumLogprobs,
    Supported,
)
from onebase.serve.api.tool_schemas import MAX_TOOLS, Description, named_by

LOGPROBS = "message.output_text.logprobs"


class TextFormat(Supported):
    """As response_format has it in chat, a level higher."""

    type: Literal["text", "json_object", "json_schema"]
    name: Label | None = None
    description: Description | None = None
    json_schema: dict[str, JsonValue] | None = Field(default=None, alias="schema")
    strict: bool | None = None

    def for_chat(self) -> dict[str, Any]:
        if self.type != "json_schema":
            return {"type": self.type}
        if self.json_schema is None or self.name is None:
            raise bad_request("text.format: json_schema needs a name and a schema.", "text.format")
        described = {"name": self.name, "schema": self.json_schema, "strict": self.strict}
        return {"type": "json_schema", "json_schema": _given(described | {"description": self.description})}


class TextOptions(Supported):
    not_yet: ClassVar[Mapping[str, tuple[JsonValue, ...]]] = {"verbosity": ("medium",)}

    format: TextFormat | None = None


class ResponseTool(Supported):
    """A function; tools that run on a server of their own are not served."""

    not_yet: ClassVar[Mapping[str, tuple[JsonValue, ...]]] = {"defer_loading": (False,)}

    type: Literal["function"]
    name: FunctionName
    description: Description | None = None
    parameters: dict[str, JsonValue] | None = None
    strict: bool | None = None

    def for_chat(self) -> dict[str, Any]:
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": _given(function | {"strict": self.strict})}


class ResponseChoice(Supported):
    type: Literal["function"]
    name: FunctionName


ResponseToolChoice = Annotated[
    Literal["none", "auto", "required"] | ResponseChoice,
    named_by(ResponseChoice, '{"type": "function", "name": ...}'),
]


class ResponseRequest(Supported):
    """POST /v1/responses. Nothing is kept between two requests: the input is the whole conversation."""

    not_yet: ClassVar[Mapping[str, tuple[JsonValue, ...]]] = {
        "background": (False,),
        "context_management": ([],),
        "conversation": (),
        "max_tool_calls": (),
        "previous_response_id": (),
        "prompt": (),
        "prompt_cache_retention": ("in_memory",),
        "reasoning": ({}, {"effort": None}, {"effort": None, "summary": None}, {"summary": None}),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "stream_options": ({}, {"include_obfuscation": False}),
        "truncation": ("disabled",),
    }

    model: ModelName
    input: str | Annotated[list[Item], Field(min_length=1, max_length=MAX_MESSAGES)]
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1, le=MAX_TOKENS)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_logprobs: NumLogprobs | None = None
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = None
    text: TextOptions | None = None
    tools: Annotated[list[ResponseTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ResponseToolChoice | None = None
    parallel_tool_calls: bool | None = None
    stream: bool | None = None
    user: Label | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None
    metadata: Annotated[dict[Label, Label], Field(max_length=16)] | None = None
    adapters: list[AdapterScale] = Field(default=[], max_length=MAX_ADAPTERS)
    top_k: int | None = Field(default=None, ge=-1, le=1 << 20)
    min_p: float | None = Field(default=None, ge=0, le=1)
    seed: int | None = Field(default=None, ge=-(1 << 63), lt=1 << 63)
    chat_template_kwargs: dict[Label, JsonValue] | None = None

    @model_validator(mode="after")
    def _alternatives_need_logprobs(self) -> ResponseRequest:
        if self.top_logprobs and not self.wants_logprobs:
            raise bad_request(f"top_logprobs is only allowed where include has {LOGPROBS}.", "top_logprobs")
        return self

    @property
    def wants_logprobs(self) -> bool:
        return LOGPROBS in (self.include or ())

    def for_chat(self) -> ChatRequest:
        """Raises ApiError 400, with the field's name here."""
        messages = as_messages(self.input)
        if self.instructions is not None:
            messages.insert(0, {"role": "system", "content": self.instructions})
        body = _given({name: getattr(self, name) for name in _SAME}) | {
            "messages": messages,
            "adapters": [adapter.model_dump() for adapter in self.adapters],
            "logprobs": self.wants_logprobs,
        }
        try:
            return ChatRequest.model_validate(body | _given(self._renamed()))
        except ApiError as error:
            raise in_our_terms(error) from error
        except ValidationError as error:
            raise in_our_terms(from_validation(error)) from error

    def _renamed(self) -> dict[str, Any]:
        text = None if self.text is None else self.text.format
        choice: Any = self.tool_choice
        if isinstance(choice, ResponseChoice):
            choice = {"type": "function", "function": {"name": choice.name}}
        return {
            "max_completion_tokens": self.max_output_tokens,
            "top_logprobs": self.top_logprobs,
            "response_format": None if text is None else text.for_chat(),
            "tools": None if self.tools is None else [tool.for_chat() for tool in self.tools],
            "tool_choice": choice,
        }


_SAME = ("model", "temperature", "top_p", "top_k", "min_p", "seed", "parallel_tool_calls", "chat_template_kwargs")
_NAMES = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
}


def in_our_terms(error: ApiError) -> ApiError:
    """An error about the chat request, with the field's name in the Responses one."""
    if error.param is None:
        return error
    first, _, rest = error.param.partition(".")
    param = error.param.replace(".function", "") if first == "tools" else _NAMES.get(first, error.param)
    told = error.message.replace(error.param, param) if rest or first in _NAMES else error.message
    return ApiError(error.status, told, param=param, code=error.code)


def _given(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}

"""What request bodies share. Nothing is ignored: unknown fields are refused, and so is what is not supported yet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, cast

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    JsonValue,
    StringConstraints,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from onebase.serve.api.errors import bad_request

MAX_CHOICES = 128  # n
MAX_PROMPTS = 2048
MAX_SEQUENCES = 1024  # prompts * n
MAX_TOKENS = 1 << 24
MAX_ADAPTERS = 16
MAX_MESSAGES = 4096
MAX_LOGPROBS = 20

TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]
Label = Annotated[str, StringConstraints(max_length=512)]
StopString = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
ModelName = Annotated[str, StringConstraints(min_length=1, max_length=256)]
NumLogprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]


class Body(BaseModel):
    """JSON of a request. Types are strict: "1" is no number and 1 is no flag."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class Supported(Body):
    """A body that knows fields of the protocol it does not serve yet: their neutral values pass, others are 400."""

    not_yet: ClassVar[Mapping[str, tuple[JsonValue, ...]]] = {}

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        drawn = handler.resolve_ref_schema(handler(core_schema))
        for field, neutral in cls.not_yet.items():
            drawn["properties"][field] = {"enum": [None, *neutral], "description": "Known, and not served yet."}
        return drawn

    @model_validator(mode="before")
    @classmethod
    def _refuse_not_yet(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for field in cls.not_yet.keys() & data.keys():
            if not _is_neutral(data[field], cls.not_yet[field]):
                raise bad_request(f"{field} is not supported yet; leave it out.", field, "unsupported_field")
        return {key: value for key, value in data.items() if key not in cls.not_yet}


def _is_neutral(value: Any, neutral: Iterable[JsonValue]) -> bool:
    return value is None or any(isinstance(value, bool) == isinstance(n, bool) and value == n for n in neutral)


class AdapterScale(Body):
    """One adapter beside ``model``, multiplied by ``scale``."""

    name: ModelName
    scale: float = Field(default=1.0, ge=-100, le=100)


class StreamOptions(Supported):
    """continuous_usage_stats: every chunk tells the usage so far, not only the last one."""

    not_yet = {"include_obfuscation": (False,)}

    include_usage: bool = False
    continuous_usage_stats: bool = False

    @model_validator(mode="after")
    def _continuous_is_more(self) -> StreamOptions:
        if self.continuous_usage_stats and not self.include_usage:
            raise bad_request(
                "stream_options.continuous_usage_stats is only allowed where include_usage is true.",
                "stream_options.continuous_usage_stats",
            )
        return self


Prompts = (
    str
    | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    | Annotated[TokenIds, Field(min_length=1)]
    | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
)


def prompt_list(given: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    """One text or list of ids for each sequence."""
    if isinstance(given, str):
        return [given]
    if isinstance(given[0], int):
        return [given]
    return cast(list[str | list[int]], given)

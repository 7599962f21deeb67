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

NEUTRAL_EVERYWHERE: Mapping[str, tuple[JsonValue, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "min_tokens": (0,),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "truncate_prompt_tokens": (),
    "priority": (0,),
    "cache_salt": (),
    "prompt_cache_key": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "use_beam_search": (False,),
    "length_penalty": (1,),
}


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
    not_yet = {"include_obfuscation": (False,), "continuous_usage_stats": (False,)}

    include_usage: bool = False


class Generation(Supported):
    """What completions and chat completions share. top_k 0 or -1: off."""

    model: ModelName
    adapters: list[AdapterScale] = Field(default=[], max_length=MAX_ADAPTERS)
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    max_tokens: int | None = Field(default=None, ge=1, le=MAX_TOKENS)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, le=1 << 20)
    min_p: float | None = Field(default=None, ge=0, le=1)
    seed: int | None = Field(default=None, ge=-(1 << 63), lt=1 << 63)
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=128)] | None = None
    ignore_eos: bool = False
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Label | None = None
    metadata: Annotated[dict[Label, Label], Field(max_length=16)] | None = None

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> Generation:
        if self.stream_options is not None and not self.stream:
            raise bad_request("stream_options is only allowed where stream is true.", "stream_options")
        return self

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives to tell beside each generated token; None: no log-probabilities."""
        return None

    @property
    def num_prompt_logprobs(self) -> int | None:
        """The same for each token of the prompt."""
        return None


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

"""The fields that completions and chat completions share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import Field, JsonValue, StringConstraints, model_validator

from onebase.serve.api.errors import bad_request
from onebase.serve.api.schemas import (
    MAX_ADAPTERS,
    MAX_CHOICES,
    MAX_TOKENS,
    AdapterScale,
    Label,
    ModelName,
    StopString,
    StreamOptions,
    Supported,
    TokenId,
)
from onebase.serve.api.structured import ResponseFormat, StructuredOutputs

MAX_BIASES = 1024
MAX_TIMEOUT = 86_400  # seconds

Penalty = Annotated[float, Field(ge=-2, le=2)]
TokenIdText = Annotated[str, StringConstraints(pattern=r"^(0|[1-9][0-9]{0,9})$")]
LogitBias = Annotated[dict[TokenIdText, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=MAX_BIASES)]

NEUTRAL_EVERYWHERE: Mapping[str, tuple[JsonValue, ...]] = {
    "spaces_between_special_tokens": (True, False),  # fast tokenizers put none between them either way
    "service_tier": ("auto", "default"),
    "store": (False,),
    "use_beam_search": (False,),
    "length_penalty": (1,),
}


class Generation(Supported):
    """What completions and chat completions share. top_k 0 or -1: off.

    truncate_prompt_tokens: keep so many at the prompt's end; -1: as many as leave room for the answer.
    prompt_cache_key, safety_identifier, user, metadata: taken, and change nothing: the prefix cache finds equal prompts
    without a key.
    """

    prompt_field: ClassVar[str] = "prompt"  # where the prompt stands

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
    min_tokens: int | None = Field(default=None, ge=0, le=MAX_TOKENS)
    logit_bias: LogitBias | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=100)
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = Field(default=None, ge=-1, le=MAX_TOKENS)
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    priority: int | None = Field(default=None, ge=-(1 << 31), lt=1 << 31)
    timeout: float | None = Field(default=None, gt=0, le=MAX_TIMEOUT)
    cache_salt: Annotated[str, StringConstraints(min_length=1, max_length=256)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    prompt_cache_key: Label | None = None
    safety_identifier: Label | None = None
    user: Label | None = None
    metadata: Annotated[dict[Label, Label], Field(max_length=16)] | None = None

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> Generation:
        if self.stream_options is not None and not self.stream:
            raise bad_request("stream_options is only allowed where stream is true.", "stream_options")
        return self

    @model_validator(mode="after")
    def _truncates_to_something(self) -> Generation:
        if self.truncate_prompt_tokens == 0:
            raise bad_request("truncate_prompt_tokens is -1 or at least 1.", "truncate_prompt_tokens")
        return self

    @model_validator(mode="after")
    def _one_grammar(self) -> Generation:
        if self.structured_outputs and self.response_format and self.response_format.type != "text":
            raise bad_request(
                "response_format and structured_outputs both ask for a grammar: give one.", "response_format"
            )
        return self

    @property
    def choices(self) -> int:
        """How many the answer has, for each prompt."""
        return self.n or 1

    @property
    def candidates(self) -> int:
        """How many are generated for each prompt."""
        return self.choices

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wants_running_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.continuous_usage_stats

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

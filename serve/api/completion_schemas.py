"""The body of completions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field, JsonValue, model_validator

from onebase.serve.api.errors import bad_request
from onebase.serve.api.generation_schemas import NEUTRAL_EVERYWHERE, Generation
from onebase.serve.api.schemas import (
    MAX_CHOICES,
    MAX_SEQUENCES,
    MAX_TOKENS,
    NumLogprobs,
    Prompts,
    prompt_list,
)


class CompletionRequest(Generation):
    """POST /v1/completions. max_tokens 0 is for those who want the prompt alone: its echo or its log-probabilities."""

    not_yet: ClassVar[Mapping[str, tuple[JsonValue, ...]]] = {**NEUTRAL_EVERYWHERE, "suffix": ("",)}

    max_tokens: int | None = Field(default=None, ge=0, le=MAX_TOKENS)
    logprobs: NumLogprobs | None = None
    prompt_logprobs: NumLogprobs | None = None
    echo: bool | None = None
    best_of: int | None = Field(default=None, ge=1, le=MAX_CHOICES)

    prompt: Prompts
    add_special_tokens: bool = True

    @property
    def prompts(self) -> list[str | list[int]]:
        return prompt_list(self.prompt)

    @property
    def candidates(self) -> int:
        return self.best_of or self.choices

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def num_prompt_logprobs(self) -> int | None:
        asked = [self.prompt_logprobs, self.logprobs if self.echo else None]
        return max((width for width in asked if width is not None), default=None)

    @model_validator(mode="after")
    def _says_something(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo and self.prompt_logprobs is None:
            raise bad_request("max_tokens 0 needs echo or prompt_logprobs: there would be no answer.", "max_tokens")
        return self

    @model_validator(mode="after")
    def _bounded(self) -> CompletionRequest:
        if len(self.prompts) * self.candidates > MAX_SEQUENCES:
            name = "best_of" if self.best_of else "n"
            raise bad_request(
                f"{len(self.prompts)} prompts with {name} {self.candidates} are over {MAX_SEQUENCES} sequences a "
                f"request.",
                name,
            )
        return self

    @model_validator(mode="after")
    def _best_is_known_at_the_end(self) -> CompletionRequest:
        if self.candidates < self.choices:
            raise bad_request(f"best_of must be at least n, which is {self.choices}.", "best_of")
        if self.stream and self.candidates > self.choices:
            raise bad_request("best_of over n is not allowed where stream is true.", "best_of")
        return self

"""Bodies of requests whose answer is numbers and no text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field, JsonValue

from onebase.serve.api.schemas import MAX_ADAPTERS, AdapterScale, Label, ModelName, Prompts, Supported, prompt_list

MAX_DIMENSIONS = 1 << 16


class Pooled(Supported):
    """What such bodies share."""

    not_yet: ClassVar[Mapping[str, tuple[JsonValue, ...]]] = {
        "truncate_prompt_tokens": (),
        "priority": (0,),
        "messages": (),
    }

    model: ModelName
    adapters: list[AdapterScale] = Field(default=[], max_length=MAX_ADAPTERS)
    input: Prompts
    add_special_tokens: bool = True
    user: Label | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        return prompt_list(self.input)


class ClassifyRequest(Pooled):
    """POST /v1/classify. ``use_activation`` false: the head's logits instead of probabilities."""

    use_activation: bool | None = None


class EmbeddingRequest(Pooled):
    """POST /v1/embeddings. dimensions: only the first so many, for models that were trained so (arXiv:2205.13147)."""

    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(default=None, ge=1, le=MAX_DIMENSIONS)
    pooling: Literal["last", "mean"] | None = None
    normalize: bool | None = None

"""Bodies of requests whose answer is numbers and no text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field, JsonValue

from onebase.serve.api.schemas import MAX_ADAPTERS, AdapterScale, Label, ModelName, Prompts, Supported, prompt_list


class ClassifyRequest(Supported):
    """POST /v1/classify. ``use_activation`` false: the head's logits instead of probabilities."""

    not_yet: ClassVar[Mapping[str, tuple[JsonValue, ...]]] = {
        "truncate_prompt_tokens": (),
        "priority": (0,),
        "messages": (),
    }

    model: ModelName
    adapters: list[AdapterScale] = Field(default=[], max_length=MAX_ADAPTERS)
    input: Prompts
    add_special_tokens: bool = True
    use_activation: bool | None = None
    user: Label | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        return prompt_list(self.input)

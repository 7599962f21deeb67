"""Bodies and query strings of the adapter routes. The registry has the last word on names, labels and versions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, field_validator, model_validator

from onebase.serve.api.errors import bad_request
from onebase.serve.api.query import Query
from onebase.serve.api.schemas import Body, ModelName

MAX_PAGE = 1000
MAX_MODELS = 10_000
MAX_LABELS = 64
MAX_VERSION = 999_999_999

Cursor = Annotated[str, StringConstraints(max_length=256)]
LabelText = Annotated[str, StringConstraints(max_length=256)]
Version = Annotated[int, Field(ge=1, le=MAX_VERSION)]


class AdapterSource(Body):
    """POST /v1/adapters as JSON. source: a folder of the server, or hf://, s3://, gs://, az://, https://."""

    name: ModelName
    source: str = Field(min_length=1, max_length=4096)
    revision: Annotated[str, StringConstraints(min_length=1, max_length=256)] | None = None


class AdapterChange(Body):
    """PATCH /v1/adapters/{name}: what is left out stays. A label or alias that is null goes.

    aliases: the version that each stands for, or "current": whatever version is current.
    """

    pinned: bool | None = None
    labels: Annotated[dict[LabelText, LabelText | None], Field(max_length=MAX_LABELS)] | None = None
    aliases: Annotated[dict[LabelText, Version | Literal["current"] | None], Field(max_length=MAX_LABELS)] | None = None

    @model_validator(mode="after")
    def _says_something(self) -> AdapterChange:
        if not self.model_fields_set:
            raise bad_request("Nothing to change: give pinned, labels or aliases.", "pinned")
        for field in self.model_fields_set:
            if getattr(self, field) is None:
                raise bad_request(f"{field}: null is no value; leave the field out.", field)
        return self

    @property
    def added_aliases(self) -> dict[str, int | None]:
        """Alias -> version; None follows the current one."""
        given = (self.aliases or {}).items()
        return {alias: None if version == "current" else version for alias, version in given if version is not None}

    @property
    def dropped_aliases(self) -> frozenset[str]:
        return frozenset(alias for alias, version in (self.aliases or {}).items() if version is None)


class VersionRange(Query):
    """GET /v1/adapters/{name}/versions. after: the last version of the page before."""

    limit: int = Field(default=100, ge=1, le=MAX_PAGE)
    after: int = Field(default=0, ge=0, le=MAX_VERSION)


class Rollback(Body):
    """POST /v1/adapters/{name}/rollback. Without a version: the one that was current before."""

    version: Version | None = None


class Collect(Body):
    """POST /v1/registry/gc. keep: how many of a name's newest versions stay, the current one counted; null: all."""

    keep: int | None = Field(default=None, ge=0, le=MAX_VERSION)
    dry_run: bool = False


class LoadLora(Body):
    """vLLM's POST /v1/load_lora_adapter."""

    lora_name: ModelName
    lora_path: str = Field(min_length=1, max_length=4096)
    load_inplace: bool = False


class UnloadLora(Body):
    """vLLM's POST /v1/unload_lora_adapter."""

    lora_name: ModelName


class AdapterFilter(Query):
    """GET /v1/adapters. label: key:value; may be repeated, and all must hold."""

    limit: int = Field(default=100, ge=1, le=MAX_PAGE)
    after: Cursor | None = None
    prefix: Cursor | None = None
    label: tuple[str, ...] = ()
    pinned: bool | None = None
    state: Literal["ready", "fetching", "checking", "failed"] | None = None

    @field_validator("label")
    @classmethod
    def _pairs(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(value) > MAX_LABELS:
            raise bad_request(f"label: at most {MAX_LABELS} of them.", "label")
        for item in value:
            if ":" not in item:
                raise bad_request(f"label: {item[:80]!r} is not key:value.", "label")
        if len({item.partition(":")[0] for item in value}) < len(value):
            raise bad_request("label: the same key is given twice; no adapter has two values for it.", "label")
        return value

    @property
    def labels(self) -> Mapping[str, str]:
        return {key: value for key, _, value in (item.partition(":") for item in self.label)}


class ModelFilter(Query):
    """GET /v1/models."""

    limit: int = Field(default=1000, ge=1, le=MAX_MODELS)
    after: Cursor | None = None


class Waiting(Query):
    """Whether to answer at once, with 202."""

    wait: bool = True


class Forcing(Query):
    """Whether requests over the adapter are aborted."""

    force: bool = False


class Unloading(Waiting, Forcing):
    """POST /v1/adapters/{name}/unload."""

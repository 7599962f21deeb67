"""What the adapter routes answer, for the OpenAPI document alone. See answer_schemas.py."""

from __future__ import annotations

from typing import Literal

from onebase.serve.api.answer_schemas import Answer


class Adapter(Answer):
    """A version of a name, or a name whose first import is under way or failed: it has no version yet."""

    name: str
    object: Literal["adapter"]
    version: int | None
    digest: str | None
    family: str | None
    rank: int | None
    bytes: int | None
    source: str
    revision: str | None
    created: int
    by: str
    state: Literal["ready", "fetching", "checking", "failed"]
    reason: str | None
    pinned: bool
    labels: dict[str, str]
    aliases: list[str]
    tier: Literal["device", "host", "disk"]
    uses: int


class AdapterVersion(Adapter):
    current: bool


class AdapterVersions(Answer):
    """GET /v1/adapters/{name}/versions: in pages; ``next`` is the following page's ``after``."""

    object: Literal["list"]
    data: list[AdapterVersion]
    has_more: bool
    next: int | None


class Adapters(Answer):
    """GET /v1/adapters: ``next`` is the following page's ``after``."""

    object: Literal["list"]
    data: list[Adapter]
    has_more: bool
    next: str | None


class DeletedAdapter(Answer):
    name: str
    object: Literal["adapter"]
    deleted: Literal[True]
    versions: list[int]


class UnloadedAdapter(Adapter):
    """was_resident: whether there was anything to free; aborted: requests that were ended."""

    was_resident: bool
    aborted: int


class Collected(Answer):
    """POST /v1/registry/gc."""

    object: Literal["gc_report"]
    dry_run: bool
    versions: list[str]
    imports: int
    blobs: list[str]
    compiled: list[str]
    bytes: int

"""What the operator allows as sources. All of it is off until an option turns it on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from onebase.adapters.sources.location import Bucket, LocationError, Url, is_hub_entry

NAME_FIELD = "{name}"


@dataclass(frozen=True, slots=True)
class SourceOptions:
    """Raises ValueError, which names the option, for an entry that no source could ever lie below.

    allow_path: folders of this machine (--allow-path). allow_hub: ``org``, ``org/name`` or ``*`` (--allow-hub).
    allow_bucket: ``s3://bucket/prefix``, gs, az (--allow-bucket). allow_url: ``https://host/prefix`` (--allow-url).
    resolver: the source of an unknown model, with {name} in it (--resolver); it has to lie below the others.
    """

    allow_path: tuple[Path, ...] = ()
    allow_hub: tuple[str, ...] = ()
    allow_bucket: tuple[str, ...] = ()
    allow_url: tuple[str, ...] = ()
    resolver: str | None = None

    def __post_init__(self) -> None:
        for entry in self.allow_hub:
            check_hub_entry(entry)
        for entry in self.allow_bucket:
            check_bucket_entry(entry)
        for entry in self.allow_url:
            check_url_entry(entry)
        if self.resolver is not None:
            check_resolver(self.resolver)

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        return tuple(Bucket.parse(entry) for entry in self.allow_bucket)

    @property
    def urls(self) -> tuple[Url, ...]:
        return tuple(Url.parse(entry) for entry in self.allow_url)


def check_hub_entry(entry: str) -> str:
    """Raises ValueError."""
    if not is_hub_entry(entry):
        raise ValueError(f"--allow-hub: {entry!r} is not an organisation, an org/name, or *")
    return entry


def check_bucket_entry(entry: str) -> str:
    """Raises ValueError."""
    try:
        Bucket.parse(entry)
    except LocationError as error:
        raise ValueError(f"--allow-bucket: {error}") from None
    return entry


def check_url_entry(entry: str) -> str:
    """Raises ValueError. Plain http is for this machine alone."""
    try:
        url = Url.parse(entry)
    except LocationError as error:
        raise ValueError(f"--allow-url: {error}") from None
    if url.scheme == "http" and not url.is_local:
        raise ValueError(f"--allow-url: {entry} is not https; http is for loopback addresses only")
    return entry


def check_resolver(template: str) -> str:
    """Raises ValueError."""
    if template.count(NAME_FIELD) != 1 or set("{}") & set(template.replace(NAME_FIELD, "")):
        raise ValueError(
            f"--resolver: {template!r} needs {NAME_FIELD} once, as in hf://org/{NAME_FIELD}, and no other brace"
        )
    return template

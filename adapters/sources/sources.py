"""All kinds of sources behind one object: which kind a text means, and its errors as AdapterError."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from onebase.adapters.errors import AdapterError, AdapterNotFound, AdapterRejected
from onebase.adapters.registry.blobs import Stage
from onebase.adapters.sources.bucket import BucketSource
from onebase.adapters.sources.folder import FolderSource
from onebase.adapters.sources.hub import HubSource
from onebase.adapters.sources.intake import Intake, Limits
from onebase.adapters.sources.location import LocationError, shown
from onebase.adapters.sources.options import NAME_FIELD, SourceOptions
from onebase.adapters.sources.web import WebSource


class Source(Protocol):
    """One kind of place. Both methods raise AdapterError, or LocationError for a text that names no place."""

    def check(self, source: str, revision: str | None) -> None:
        """Whether it may be fetched, as far as can be said without a connection."""

    def fetch(self, source: str, revision: str | None, intake: Intake) -> str | None:
        """Fill the intake's stage; blocks. Returns the revision that was fetched, where there is such a thing."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """source: as it was asked for. revision: what will fetch the same files again, or None."""

    source: str
    revision: str | None


class Sources:
    """Thread-safe. ``close`` ends fetches under way, each at its next read."""

    def __init__(
        self, options: SourceOptions, *, limits: Limits | None = None, kinds: Mapping[str, Source] | None = None
    ) -> None:
        """kinds: by scheme, in place of those that ``options`` describe. Raises ValueError for a resolver that no
        other option allows."""
        self._kinds = kinds_of(options) if kinds is None else kinds
        self._limits = limits or Limits()
        self._resolver = options.resolver
        self._stop = threading.Event()
        self._check_resolver()

    def check(self, source: str, revision: str | None = None) -> None:
        """Fails fast what could never be fetched. Raises AdapterRejected, AdapterNotFound."""
        with _located():
            self._kind(source).check(source, revision)

    def fetch(self, source: str, revision: str | None, stage: Stage) -> Fetched:
        """Fill a stage; blocks, for a bounded time. Raises AdapterError."""
        with _located():
            intake = Intake(stage, self._limits, self._stop)
            return Fetched(source, self._kind(source).fetch(source, revision, intake))

    def resolve(self, name: str) -> str | None:
        """Where --resolver says that an adapter of this name would be; None without one."""
        return None if self._resolver is None else self._resolver.replace(NAME_FIELD, name)

    def close(self) -> None:
        self._stop.set()

    def _kind(self, source: str) -> Source:
        scheme, separator, _ = source.partition("://")
        kind = self._kinds.get(scheme if separator else "file")
        if kind is None:
            raise AdapterRejected(f"{shown(source)}: the kinds of sources are {_KINDS}.", param="source")
        if not separator and not source.startswith("/"):
            raise AdapterRejected(
                f"{shown(source)} is not an absolute path below an --allow-path. Sources are {_KINDS}.", param="source"
            )
        return kind

    def _check_resolver(self) -> None:
        sample = self.resolve("name")
        try:
            if sample is not None:
                self.check(sample)
        except AdapterNotFound:
            pass  # there may be no adapter called "name"
        except AdapterError as error:
            raise ValueError(f"--resolver: {error.message}") from None


_KINDS = (
    "/folder, hf://org/name (org/name alone could be a folder), s3://bucket/folder, gs://bucket/folder, "
    "az://container/folder and https://host/folder"
)


def kinds_of(options: SourceOptions) -> dict[str, Source]:
    """By scheme."""
    bucket, web = BucketSource(options.buckets), WebSource(options.urls)
    folder, hub = FolderSource(options.allow_path), HubSource(options.allow_hub)
    return {"file": folder, "hf": hub, "s3": bucket, "gs": bucket, "az": bucket, "https": web, "http": web}


@contextmanager
def _located() -> Iterator[None]:
    try:
        yield
    except LocationError as error:
        raise AdapterRejected(str(error), param="source") from None

"""Object stores: S3, Google Cloud Storage, Azure Blob Storage, by obstore.

Credentials, regions and endpoints come from the environment variables that each vendor's tools read. An object is read
in ranges, each on the condition that the object is still the one that was listed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from onebase.adapters.errors import AdapterNotFound, AdapterRejected, SourceFailed
from onebase.adapters.sources.answers import check_status
from onebase.adapters.sources.intake import Intake, Limits, wanted_files
from onebase.adapters.sources.location import Bucket

if TYPE_CHECKING:
    from obstore import GetOptions, ObjectMeta
    from obstore.store import ObjectStore, RetryConfig

RANGE_BYTES = 8 << 20
MAX_LISTED = 1000  # objects below the folder, subfolders included

_STATUS = re.compile(r"status code: ([1-5][0-9]{2})")

OpenStore = Callable[[Bucket, Limits], "ObjectStore"]


@dataclass(frozen=True, slots=True)
class _Object:
    """An object as listed. etag: None in a store that has none; ``identity`` is the best it has in its place."""

    name: str
    path: str
    size: int
    etag: str | None
    identity: str


class BucketSource:
    """``s3://bucket/folder``, ``gs://bucket/folder``, ``az://container/folder``."""

    def __init__(self, allowed: Sequence[Bucket], open_store: OpenStore | None = None) -> None:
        self._allowed = allowed
        self._open = open_store or open_by_environment

    def check(self, source: str, revision: str | None) -> None:
        """revision: one that an earlier fetch returned, or None."""
        self._parse(source)

    def fetch(self, source: str, revision: str | None, intake: Intake) -> str:
        """Returns a digest over the identities of the objects. Raises AdapterNotFound where ``revision`` is another."""
        where = self._parse(source)
        with _readable(where):
            store = self._open(where, intake.limits)
            objects = _list(store, where, intake)
            found = _revision(objects)
            if revision not in {None, found}:
                raise AdapterNotFound(f"The objects have changed: their revision is {found} now.", param="revision")
            for item in objects:
                intake.write(item.name, _ranges(store, item, intake), item.size)
        return found

    def _parse(self, source: str) -> Bucket:
        if not self._allowed:
            raise AdapterRejected("Loading from object stores is off; --allow-bucket turns it on.", param="source")
        where = Bucket.parse(source)
        if not any(where.is_below(entry) for entry in self._allowed):
            raise AdapterRejected("The source is not below an --allow-bucket.", param="source")
        return where


def open_by_environment(where: Bucket, limits: Limits) -> ObjectStore:
    """A client whose every request is bounded in time; a failed one is tried twice again."""
    from obstore.store import AzureStore, GCSStore, S3Store

    kinds: dict[str, Callable[..., ObjectStore]] = {"s3": S3Store, "gs": GCSStore, "az": AzureStore}
    # As settings beside the environment's: client_options would take the place of AWS_ALLOW_HTTP and its like.
    client = {"timeout": f"{limits.grace}s", "connect_timeout": f"{limits.idle}s", "read_timeout": f"{limits.idle}s"}
    retry: RetryConfig = {"max_retries": 2, "retry_timeout": timedelta(seconds=limits.grace)}
    return kinds[where.scheme](where.bucket, config=client, retry_config=retry)


def _list(store: ObjectStore, where: Bucket, intake: Intake) -> tuple[_Object, ...]:
    """The objects to fetch, by name. Raises AdapterNotFound, AdapterRejected."""
    found: dict[str, _Object] = {}
    count = 0
    for chunk in store.list(where.prefix or None, chunk_size=MAX_LISTED):
        intake.patience.left()
        count += len(chunk)
        if count > MAX_LISTED:
            raise AdapterRejected(
                f"There are over {MAX_LISTED} objects below the source: name one adapter's folder.", param="source"
            )
        for meta in chunk:
            folder, _, name = meta["path"].rpartition("/")
            if folder == where.prefix:
                found[name] = _object(name, meta)
    if not count:
        raise AdapterNotFound("There are no objects below the source.", param="source")
    return tuple(found[name] for name in wanted_files(found))


def _object(name: str, meta: ObjectMeta) -> _Object:
    identity = meta["version"] or meta["e_tag"] or meta["last_modified"].isoformat()
    return _Object(name, meta["path"], meta["size"], meta["e_tag"], identity)


def _revision(objects: Sequence[_Object]) -> str:
    lines = (f"{item.name}\0{item.size}\0{item.identity}\n" for item in objects)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _ranges(store: ObjectStore, item: _Object, intake: Intake) -> Iterator[bytes]:
    for start in range(0, item.size, RANGE_BYTES):
        intake.patience.left()
        options: GetOptions = {"range": (start, min(start + RANGE_BYTES, item.size)), "if_match": item.etag}
        yield bytes(store.get(item.path, options=options).bytes())


@contextmanager
def _readable(where: Bucket) -> Iterator[None]:
    """The library's errors as ours. Their texts are not repeated: they hold addresses that may be signed."""
    from obstore import exceptions

    try:
        yield
    except FileNotFoundError as error:
        raise AdapterNotFound("The bucket or one of its objects is not there.", param="source") from error
    except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError) as error:
        raise AdapterRejected(f"The {where.scheme} store refuses access to this server.", param="source") from error
    except exceptions.PreconditionError as error:
        raise SourceFailed("An object changed while it was read.", param="source") from error
    except (exceptions.BaseError, ValueError) as error:
        if (status := _STATUS.search(str(error))) is not None:  # a listing's errors have no classes of their own
            check_status(int(status[1]), f"{where.scheme}://{where.bucket}")
        raise SourceFailed(
            f"The {where.scheme} store failed ({type(error).__name__}): is it up, and the environment set for it?",
            param="source",
        ) from error

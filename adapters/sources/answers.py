"""What an HTTP answer's status and headers mean for a fetch."""

from __future__ import annotations

import re
from collections.abc import Mapping

from onebase.adapters.errors import AdapterNotFound, AdapterRejected, SourceFailed

_LENGTH = re.compile(r"[0-9]{1,15}")


def check_status(status: int, what: str) -> None:
    """Nothing but 200 is an answer with a file. Raises AdapterNotFound, AdapterRejected, SourceFailed."""
    if status in {404, 410}:
        raise AdapterNotFound(f"{what}: there is no such thing at the source.", param="source")
    if status in {401, 403}:
        raise AdapterRejected(f"{what}: the source refuses access ({status}) to this server.", param="source")
    if 300 <= status < 400:
        raise AdapterRejected(f"{what}: the source redirects ({status}); redirects are not followed.", param="source")
    if status != 200:
        raise SourceFailed(f"{what}: the source answered {status}.", param="source")


def content_length(what: str, headers: Mapping[str, str]) -> int | None:
    """The bytes that the body will have, if that was said. Raises SourceFailed where they would not be the file's."""
    if headers.get("content-encoding", "identity") != "identity":
        raise SourceFailed(f"{what}: the source compressed the file, which was not asked for.", param="source")
    length = headers.get("content-length")
    if length is not None and not _LENGTH.fullmatch(length):
        raise SourceFailed(f"{what}: the source's Content-Length is no number.", param="source")
    return None if length is None else int(length)

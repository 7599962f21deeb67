"""Where a source points, parsed strictly: addresses, buckets, repositories, and what lies below an allowed one.

Nothing here opens a connection. What a library would have to repair (a userinfo, an encoded slash, ``..``, an octal
address) is refused, so that what was compared with the allow list is what is fetched.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Self

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

_PORTS = {"https": 443, "http": 80}
_BUCKET_SCHEMES = ("s3", "gs", "az")
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
_NUMERIC = re.compile(r"[0-9]+|0x[0-9a-f]*")
_SEGMENT = re.compile(r"[A-Za-z0-9._~!$&'()*+,=:@-]+")  # RFC 3986's but for %, and for ; where parsers disagree
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,221}[a-z0-9]")
_REPO_PART = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,199}")
MAX_SOURCE = 1024


class LocationError(ValueError):
    """The text names no place; the message says what is allowed and repeats no query string or userinfo."""


@dataclass(frozen=True, slots=True)
class Url:
    """A folder at an http(s) address. path: its segments."""

    scheme: str
    host: str
    port: int
    path: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises LocationError."""
        scheme, _, rest = _plain(text).partition("://")
        if scheme not in _PORTS:
            raise LocationError(f"{shown(text)} is not an https:// address.")
        authority, _, path = rest.partition("/")
        host, port = _host_and_port(authority, text)
        return cls(scheme, host, _PORTS[scheme] if port is None else port, _segments(path, text))

    @property
    def address(self) -> IPAddress | None:
        """The host, where it is a literal address."""
        return _literal(self.host)

    @property
    def is_local(self) -> bool:
        """Whether the host is this machine by its spelling alone, without a look-up."""
        return self.host == "localhost" or (self.address is not None and self.address.is_loopback)

    @property
    def authority(self) -> str:
        """The value of a Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"

    def is_below(self, other: Url) -> bool:
        mine, theirs = (self.scheme, self.host, self.port), (other.scheme, other.host, other.port)
        return mine == theirs and self.path[: len(other.path)] == other.path


@dataclass(frozen=True, slots=True)
class Bucket:
    """A folder of an object store. scheme: s3, gs or az; path: the segments of its prefix."""

    scheme: str
    bucket: str
    path: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises LocationError."""
        scheme, _, rest = _plain(text).partition("://")
        bucket, _, prefix = rest.partition("/")
        if scheme not in _BUCKET_SCHEMES or not _BUCKET.fullmatch(bucket):
            raise LocationError(
                f"{shown(text)} is not s3://bucket/folder, gs://bucket/folder or az://container/folder."
            )
        return cls(scheme, bucket, _segments(prefix, text))

    @property
    def prefix(self) -> str:
        return "/".join(self.path)

    def is_below(self, other: Bucket) -> bool:
        same = (self.scheme, self.bucket) == (other.scheme, other.bucket)
        return same and self.path[: len(other.path)] == other.path


@dataclass(frozen=True, slots=True)
class Repo:
    """A folder of a repository on the Hugging Face Hub. subfolder: empty for its root."""

    org: str
    name: str
    revision: str | None
    subfolder: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """``hf://org/name[@revision][/subfolder]``. Raises LocationError. A revision with a slash has to be a field."""
        org, _, rest = _plain(text).removeprefix("hf://").partition("/")
        repo, _, subfolder = rest.partition("/")
        name, at, revision = repo.partition("@")
        if not (text.startswith("hf://") and _is_repo_part(org) and _is_repo_part(name)):
            raise LocationError(f"{shown(text)} is not hf://org/name, hf://org/name@revision or hf://org/name/folder.")
        if at:
            check_revision(revision)
        return cls(org, name, revision or None, "/".join(_segments(subfolder, text)))

    @property
    def id(self) -> str:
        return f"{self.org}/{self.name}"


def check_revision(revision: str) -> str:
    """A branch, a tag or a commit. Raises LocationError."""
    if not _REVISION.fullmatch(revision) or ".." in revision or "//" in revision:
        raise LocationError(f"{shown(revision)} is not a branch, a tag or a commit.")
    return revision


def is_hub_entry(text: str) -> bool:
    """Whether this is what --allow-hub takes: an organisation, one of its repositories, or ``*``."""
    org, slash, name = text.partition("/")
    return text == "*" or (_is_repo_part(org) and (not slash or _is_repo_part(name)))


def shown(source: str) -> str:
    """A source as messages may repeat it: without userinfo, query and fragment, which may carry a secret."""
    source = re.split(r"[?#]", source, maxsplit=1)[0]
    scheme, separator, rest = source.partition("//")
    authority, slash, path = rest.partition("/")
    if "@" in authority and scheme != "hf:":
        source = f"{scheme}{separator}{authority.rpartition('@')[2]}{slash}{path}"
    return repr(source[:200])


def _plain(text: str) -> str:
    if len(text) > MAX_SOURCE or not text.isascii() or not text.isprintable() or re.search(r"[\s\\]", text):
        raise LocationError(
            f"{shown(text)} is not a source: at most {MAX_SOURCE} printable ASCII characters without spaces or "
            "backslashes are allowed."
        )
    return text


def _host_and_port(authority: str, text: str) -> tuple[str, int | None]:
    if "@" in authority:
        raise LocationError(f"{shown(text)}: user names and passwords in an address are not allowed.")
    host, bracket, rest = authority.removeprefix("[").partition("]")
    if authority.startswith("[") != bool(bracket):
        raise LocationError(f"{shown(text)} has no valid host.")
    if not bracket:
        host, colon, port = authority.partition(":")
    else:
        colon, port = rest[:1], rest[1:]
    if (colon and colon != ":") or (colon and not re.fullmatch(r"[1-9][0-9]{0,4}", port)) or int(port or 0) > 65535:
        raise LocationError(f"{shown(text)} has no valid port.")
    return _host(host.lower(), text, literal=bool(bracket)), int(port) if colon else None


def _host(host: str, text: str, *, literal: bool) -> str:
    """A name, or an address in its one canonical spelling: 0x7f.1, 017700000001 and 2130706433 are neither."""
    labels = host.split(".")
    if literal or _NUMERIC.fullmatch(labels[-1]):
        address = _literal(host)
        if address is None or literal != (address.version == 6):
            raise LocationError(f"{shown(text)}: an address is written as 192.0.2.1 or [2001:db8::1].")
        return str(address)
    if len(host) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise LocationError(f"{shown(text)} has no valid host.")
    return host


def _literal(host: str) -> IPAddress | None:
    try:
        return None if "%" in host else ipaddress.ip_address(host)
    except ValueError:
        return None


def _segments(path: str, text: str) -> tuple[str, ...]:
    """A path's segments; one slash at its end means nothing."""
    path = path.removesuffix("/")
    segments = tuple(path.split("/")) if path else ()
    if not all(_SEGMENT.fullmatch(segment) and segment.strip(".") for segment in segments):
        raise LocationError(
            f"{shown(text)}: a path has letters, digits and -._~!$&'()*+,=:@ between single slashes; "
            "`..`, percent signs, queries and fragments are not allowed."
        )
    return segments


def _is_repo_part(text: str) -> bool:
    return bool(_REPO_PART.fullmatch(text)) and ".." not in text and "--" not in text

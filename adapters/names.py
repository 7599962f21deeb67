"""Adapter names and references: what a name may look like, ``name@3``, ``name@sha256:0123456789ab``.

Names become database keys, metric labels and URL parts; they never become paths (blobs are named by digest).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from onebase.adapters.errors import AdapterNameInvalid

ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")
_DIGEST = re.compile(r"sha256:([0-9a-f]{12,64})")


@dataclass(frozen=True, slots=True)
class Reference:
    """A name (or an alias), and the version asked for: by number, by the start of its digest, or the current one."""

    name: str
    version: int | None = None
    digest: str | None = None

    @property
    def bare(self) -> bool:
        """Whether only a name was given, which may be an alias then."""
        return self.version is None and self.digest is None


def check_name(name: str, *, param: str = "name") -> str:
    """The name itself, if it is one. Raises AdapterNameInvalid."""
    if not ADAPTER_NAME.fullmatch(name):
        raise AdapterNameInvalid(
            f"{_shown(name)} is not an adapter name: 1 to 128 of the characters A-Z a-z 0-9 . _ - are allowed, "
            "and the first must be a letter or a digit.",
            param=param,
        )
    return name


def parse_reference(reference: str) -> Reference:
    """``name``, ``name@3`` or ``name@sha256:<12 to 64 hex digits>``. Raises AdapterNameInvalid."""
    name, at, version = reference.partition("@")
    check_name(name)
    if not at:
        return Reference(name)
    if _VERSION.fullmatch(version):
        return Reference(name, version=int(version))
    if match := _DIGEST.fullmatch(version):
        return Reference(name, digest=match.group(1))
    raise AdapterNameInvalid(
        f"{_shown(reference)} names no version: write name@3, with a positive number after the @, or "
        "name@sha256: and 12 to 64 lower-case hex digits.",
        param="name",
    )


def _shown(text: str) -> str:
    return repr(text if len(text) <= 140 else text[:140] + "...")

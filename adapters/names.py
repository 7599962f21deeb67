"""Adapter names and references: what a name may look like, and ``name@3``.

Names become database keys, metric labels and URL parts; they never become paths (blobs are named by digest).
"""

from __future__ import annotations

import re

from onebase.adapters.errors import AdapterNameInvalid

ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")


def check_name(name: str) -> str:
    """The name itself, if it is one. Raises AdapterNameInvalid."""
    if not ADAPTER_NAME.fullmatch(name):
        raise AdapterNameInvalid(
            f"{_shown(name)} is not an adapter name: 1 to 128 of the characters A-Z a-z 0-9 . _ - are allowed, "
            "and the first must be a letter or a digit.",
            param="name",
        )
    return name


def parse_reference(reference: str) -> tuple[str, int | None]:
    """``name`` -> (name, None), ``name@3`` -> (name, 3). Raises AdapterNameInvalid."""
    name, at, version = reference.partition("@")
    check_name(name)
    if not at:
        return name, None
    if not _VERSION.fullmatch(version):
        raise AdapterNameInvalid(
            f"{_shown(reference)} names no version: write name@3, with a positive number after the @.", param="name"
        )
    return name, int(version)


def _shown(text: str) -> str:
    return repr(text if len(text) <= 140 else text[:140] + "...")

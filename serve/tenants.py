"""Tenants: who shares the server, by the keys in the operator's file. A TOML file, one table each:

    [[tenant]]
    name = "research"
    keys = ["..."]               # 16 to 256 printable characters each
    weight = 2.0                 # its share beside the others' weights
    max_inflight_seqs = 100      # these are its own limits, below the server's
    max_inflight_tokens = 200000
    priority = 0                 # of its requests, unless they ask for a higher, less urgent one

Requests with the server's API key or admin key, or without any, are those of a tenant without a name.
"""

from __future__ import annotations

import hmac
import re
import secrets
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, SecretStr, StringConstraints, ValidationError

MOST_TENANTS = 1000
_KEY = re.compile(r"[\x21-\x7e]{16,256}")
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


@dataclass(frozen=True, slots=True)
class Tenant:
    """What the server knows of one. None: no limit of its own."""

    name: str = ""
    weight: float = 1.0
    max_inflight_seqs: int | None = None
    max_inflight_tokens: int | None = None
    priority: int | None = None


NOBODY = Tenant()


class _Entry(BaseModel):
    """A table of the file."""

    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)

    name: Name
    keys: list[SecretStr] = Field(min_length=1, max_length=16)
    weight: float = Field(default=1.0, ge=0.01, le=100)
    max_inflight_seqs: int | None = Field(default=None, ge=1)
    max_inflight_tokens: int | None = Field(default=None, ge=1)
    priority: int = 0

    def tenant(self) -> Tenant:
        return Tenant(self.name, self.weight, self.max_inflight_seqs, self.max_inflight_tokens, self.priority)


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)

    tenant: list[_Entry] = Field(min_length=1, max_length=MOST_TENANTS)


class Keyring:
    """Keys and whose they are. What is looked up is a digest with a secret of this process: how long a look takes says
    nothing about keys that are nearly right."""

    def __init__(self, entries: Iterable[tuple[str, Tenant]] = ()) -> None:
        self._secret = secrets.token_bytes(32)
        self._owners = {self._digest(key.encode()): tenant for key, tenant in entries}
        self.tenants = tuple(dict.fromkeys(self._owners.values()))

    def __bool__(self) -> bool:
        return bool(self._owners)

    def owner(self, key: bytes) -> Tenant | None:
        """Whose key it is."""
        return self._owners.get(self._digest(key))

    @property
    def weights(self) -> tuple[tuple[str, float], ...]:
        return tuple((tenant.name, tenant.weight) for tenant in self.tenants)

    def _digest(self, key: bytes) -> bytes:
        return hmac.digest(self._secret, key, "sha256")


def read_keys(path: Path | None) -> Keyring:
    """The file's tenants. Raises ValueError, which tells no key, where it is not as above."""
    if path is None:
        return Keyring()
    try:
        entries = _File.model_validate(tomllib.loads(path.read_text())).tenant
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        raise ValueError(f"--keys: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"--keys: {path}: {error}") from None
    _check(entries)
    return Keyring(
        [(key.get_secret_value(), tenant) for one in entries for tenant in [one.tenant()] for key in one.keys]
    )


def _check(entries: list[_Entry]) -> None:
    names = [entry.name for entry in entries]
    if len(set(names)) < len(names):
        raise ValueError(f"--keys: {next(n for n in names if names.count(n) > 1)}: two tenants have this name")
    seen: set[str] = set()
    for entry in entries:
        for key in (secret.get_secret_value() for secret in entry.keys):
            if not _KEY.fullmatch(key):
                raise ValueError(
                    f"--keys: {entry.name}: a key has 16 to 256 printable ASCII characters, without spaces"
                )
            if key in seen:
                raise ValueError(f"--keys: {entry.name}: one of its keys is given twice")
            seen.add(key)

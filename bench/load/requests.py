"""A planned request as the bytes that are sent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from onebase.bench.load.http import Address
from onebase.bench.load.prompts import Ids, Prompts, Words
from onebase.bench.load.workload import Planned

Endpoint = Literal["completions", "chat"]


@dataclass(frozen=True, slots=True)
class Target:
    """What is asked of whom. vocabulary: prompts are ids below it; 0: words. keys: by tenant, "" for none.

    ignore_eos: ask for answers of exactly the length planned, in the field that vLLM, SGLang, llama.cpp and this
    server know.
    """

    url: str
    endpoint: Endpoint = "completions"
    vocabulary: int = 0
    keys: tuple[str, ...] = ("",)
    seed: int = 42
    ignore_eos: bool = True
    timeout: float = 600.0
    extra: dict[str, Any] = field(default_factory=dict)


class Encoder:
    """Makes whole requests."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._address = Address.parse(target.url)
        text = target.endpoint == "chat" or not target.vocabulary
        self._prompts: Prompts = Words(target.seed) if text else Ids(target.vocabulary, target.seed)
        self._heads = [self._head(key) for key in target.keys]

    def encode(self, planned: Planned) -> bytes:
        """Head and body."""
        body = msgspec.json.encode(self._body(planned))
        return self._heads[planned.tenant] + b"Content-Length: %d\r\n\r\n" % len(body) + body

    def _body(self, planned: Planned) -> dict[str, Any]:
        fields: dict[str, Any] = {
            "model": planned.model,
            "max_tokens": planned.tokens_out,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self._target.ignore_eos:
            fields["ignore_eos"] = True
        prompt = self._prompts.of(planned)
        if self._target.endpoint == "chat":
            return fields | {"messages": [{"role": "user", "content": prompt}]} | self._target.extra
        return fields | {"prompt": prompt} | self._target.extra

    def _head(self, key: str) -> bytes:
        path = "/v1/chat/completions" if self._target.endpoint == "chat" else "/v1/completions"
        lines = [
            f"POST {self._address.prefix}{path} HTTP/1.1",
            f"Host: {self._address.netloc}",
            "Content-Type: application/json",
            "Accept: text/event-stream",
            *([f"Authorization: Bearer {key}"] if key else []),
        ]
        return "".join(f"{line}\r\n" for line in lines).encode()


def printable(keys: Sequence[str]) -> None:
    """Raises ValueError for a key that no header can carry."""
    if any(not key.isascii() or not key.isprintable() or " " in key for key in keys):
        raise ValueError("key: printable ASCII characters without spaces")

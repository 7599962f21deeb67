"""A server that only counts: the PEFT server over a model that adds one. ``stub.py PORT REFUSED`` serves it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from onebase.bench.peers.batcher import Job


class Counting:
    """Answers with the prompt's length, and on from there. refused: names that it does not load."""

    vocab_size = 1024

    def __init__(self, *refused: str) -> None:
        self.refused = refused
        self.adapters: set[str] = set()
        self.batches: list[list[str | None]] = []
        self.tokenizer: Any = _Tokenizer()

    def add(self, name: str, folder: Path) -> None:
        if name in self.refused:
            raise ValueError(f"{name} is of a family that is not served here")
        self.adapters.add(name)

    def generate(self, batch: Sequence[Job], step: Callable[[Sequence[int]], None]) -> None:
        self.batches.append([job.adapter for job in batch])
        if any(job.adapter == "broken" for job in batch):
            raise RuntimeError("not beside each other")
        for token in range(max(job.tokens_out for job in batch)):
            step([len(job.prompt) + token for job in batch])


class _Tokenizer:
    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}

    def decode(self, ids: Sequence[int]) -> str:
        return f"{ids[0]} "


def main(arguments: Sequence[str]) -> None:
    import uvicorn

    from onebase.bench.peers.peft_server import create_app

    port, *refused = arguments
    uvicorn.run(create_app(Counting(*refused), 4), host="127.0.0.1", port=int(port), log_level="warning")


if __name__ == "__main__":
    main(sys.argv[1:])

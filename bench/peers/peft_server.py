"""PEFT behind the batcher, as an OpenAI-like server: streamed greedy completions, and vLLM's route to load adapters.

``python -m onebase.bench.peers.peft_server MODEL --port PORT [--rows 16] [--dtype bfloat16]``
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse

from onebase.bench.http_server import BASE
from onebase.bench.peers.batcher import Batcher, Job

Tokens: TypeAlias = "asyncio.Queue[int | Exception | None]"


class Model(Protocol):
    """What the server needs of peft_model.PeftModel."""

    tokenizer: Any
    vocab_size: int
    adapters: set[str]

    def add(self, name: str, folder: Path) -> None: ...

    def generate(self, batch: Sequence[Job], step: Callable[[Sequence[int]], None]) -> None: ...


def create_app(model: Model, rows: int) -> FastAPI:
    app = FastAPI()
    batcher = Batcher(model.generate, rows)

    @app.get("/health")
    async def health() -> PlainTextResponse:
        return PlainTextResponse("")

    @app.get("/version")
    async def told() -> dict[str, str]:
        return {"version": f"peft {version('peft')}, transformers {version('transformers')}"}

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> dict[str, int]:
        return {"vocab_size": model.vocab_size}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        cards = [{"id": BASE}, *({"id": name, "parent": BASE} for name in sorted(model.adapters))]
        return {"object": "list", "data": cards}

    @app.post("/v1/load_lora_adapter")
    async def load(request: Request) -> PlainTextResponse:
        body = await request.json()
        try:
            await asyncio.to_thread(model.add, str(body["lora_name"]), Path(body["lora_path"]))
        except Exception as error:  # whatever PEFT raises is its refusal
            return PlainTextResponse(f"{type(error).__name__}: {error}", 400)
        return PlainTextResponse("loaded")

    @app.post("/v1/completions", response_model=None)
    async def completions(request: Request) -> StreamingResponse | JSONResponse:
        body = await request.json()
        name = body.get("model")
        if name != BASE and name not in model.adapters:
            return _error(404, f"model {name!r} is not there")
        if not body.get("stream") or body.get("temperature", 1):
            return _error(400, "only streamed greedy completions are served: stream true, temperature 0")
        prompt = body.get("prompt")
        ids = prompt if isinstance(prompt, list) else model.tokenizer(str(prompt))["input_ids"]
        tokens: Tokens = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def emit(token: int | Exception | None) -> None:
            loop.call_soon_threadsafe(tokens.put_nowait, token)

        tokens_out = int(body.get("max_tokens", 16))
        batcher.add(Job(tuple(ids), tokens_out, None if name == BASE else name, emit))
        return StreamingResponse(_events(model, name, len(ids), tokens), media_type="text/event-stream")

    return app


def _error(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": "invalid_request_error"}}, status)


async def _events(model: Model, name: str, tokens_in: int, tokens: Tokens) -> AsyncIterator[bytes]:
    """A piece for each token, then the usage."""
    count = 0
    while (token := await tokens.get()) is not None:
        if isinstance(token, Exception):
            yield _event({"error": {"message": f"{type(token).__name__}: {token}", "type": "server_error"}})
            return
        count += 1
        text = model.tokenizer.decode([token])
        yield _event({"model": name, "choices": [{"index": 0, "text": text, "finish_reason": None}], "usage": None})
    usage = {"prompt_tokens": tokens_in, "completion_tokens": count, "total_tokens": tokens_in + count}
    yield _event({"model": name, "choices": [], "usage": usage})
    yield b"data: [DONE]\n\n"


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body).encode() + b"\n\n"


def main() -> None:
    import torch

    from onebase.bench.peers.peft_model import PeftModel

    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    options = parser.parse_args()
    model = PeftModel(options.model, getattr(torch, options.dtype))
    uvicorn.run(create_app(model, options.rows), host="127.0.0.1", port=options.port, log_level="warning")


if __name__ == "__main__":
    main()

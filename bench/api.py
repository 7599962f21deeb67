"""What the API process spends on a token: the real application over HTTP, behind it an engine without a model.

Steps come as frames off the wire, encoded beforehand; clients are a process of their own. What is counted is the CPU
time of this process from the first frame to the end of the last stream: decoding, detokenising, writing events, the
sockets, and the loop's turns.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
import uvloop

from onebase.bench.report import Spread, show, store
from onebase.serve.api.app import create_app
from onebase.serve.config import Settings
from onebase.serve.demo import BASE
from onebase.serve.engine.dispatch import DispatchingClient
from onebase.serve.engine.messages import Command, EngineInfo, FinishReason, Request, TokenOutput
from onebase.serve.engine.wire import Message, decode, encode

TARGET_US = 150.0
TEXT = "The fox is red, and the owl can fly. How many legs does the spider have? It has eight legs. "
CLIENTS = "import sys; from onebase.bench.api_clients import main; main(sys.argv[1:])"


@dataclass(frozen=True, slots=True)
class Case:
    """streams: at once; tokens: of each; pause: seconds between two steps."""

    route: str
    streams: int
    tokens: int
    pause: float


class SteppingEngine(DispatchingClient):
    """Answers all requests with the same tokens, one for each in every step."""

    def __init__(self, tokens: Sequence[int]) -> None:
        super().__init__()
        self._tokens = tokens
        self._asked: list[str] = []

    async def start(self) -> None:
        self._info = EngineInfo("llama", "f" * 64, "none", "none", 1 << 20, 1 << 20, 16, 1, 1, ())
        self._now_ready()

    async def stop(self) -> None:
        self._ready = False

    def _send(self, message: Command) -> None:
        if isinstance(message, Request):
            self._asked.append(message.id)

    async def answer(self, case: Case) -> float:
        """CPU seconds that it took to bring every stream all of its tokens."""
        await _until(lambda: len(self._asked) == case.streams)
        frames = [encode(self._step(at, case)) for at in range(case.tokens)]
        self._asked.clear()
        started = time.process_time()
        for frame in frames:
            for message in decode(frame):
                self._deliver(message)  # type: ignore[arg-type]
            await asyncio.sleep(case.pause)
        await _until(lambda: not self._waiting)
        return time.process_time() - started

    def _step(self, at: int, case: Case) -> list[Message]:
        token = self._tokens[at % len(self._tokens)]
        reason: FinishReason | None = "length" if at == case.tokens - 1 else None
        return [TokenOutput(request_id, (token,), reason) for request_id in self._asked]


def run(case: Case, rounds: int, out: Path | None) -> None:
    """Prints microseconds of CPU a token beside the target."""
    spread = Spread(tuple(uvloop.run(_measure(case, rounds))))
    rows = {"streams": str(case.streams), "CPU µs a token": str(spread), "target": f"{TARGET_US:.0f}"}
    show(f"API process, {case.route}", rows)
    store(out, "api", {"case": {"route": case.route, "streams": case.streams}, "us_per_token": spread.values})


async def _measure(case: Case, rounds: int) -> list[float]:
    """Microseconds a token, round by round; the first round warms up and is not among them."""
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(model=str(BASE), served_model_name="base", data_dir=Path(folder))
        engine = SteppingEngine(_tokens())
        app = create_app(settings, engine)
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, access_log=False))
        serving = asyncio.create_task(server.serve())
        await _until(lambda: server.started and app.state.server.loaded is not None)
        seconds = [await _round(engine, case, server.servers[0].sockets[0].getsockname()[1]) for _ in range(rounds + 1)]
        server.should_exit = True
        await serving
    return [1e6 * one / (case.streams * case.tokens) for one in seconds[1:]]


async def _round(engine: SteppingEngine, case: Case, port: int) -> float:
    arguments = [str(port), case.route, str(case.streams), str(case.tokens)]
    clients = await asyncio.create_subprocess_exec(sys.executable, "-P", "-c", CLIENTS, *arguments)
    seconds = await engine.answer(case)
    if await clients.wait():
        raise RuntimeError("the clients did not get what they asked for")
    return seconds


async def _until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - neither uvicorn nor the engine's client tells
        await asyncio.sleep(0.005)


def _tokens() -> list[int]:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(BASE)
    return list(tokenizer.encode(TEXT, add_special_tokens=False))

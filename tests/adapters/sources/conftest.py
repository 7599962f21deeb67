"""A store to fetch into, a tiny adapter's files, and servers on 127.0.0.1 that answer as a test tells them to."""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from onebase.adapters.registry.blobs import BlobStore
from onebase.adapters.sources import Fetched, Limits, Sources

MAX_BYTES = 1 << 20
QUICK = Limits(grace=1.0, rate=1 << 20, idle=0.5)
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"

Answer = Callable[[BaseHTTPRequestHandler], None]


def adapter_files(fill: float = 1.0) -> dict[str, bytes]:
    tensors = {"base_model.model.x.lora_A.weight": torch.full((2, 4), fill)}
    return {CONFIG: json.dumps({"peft_type": "LORA", "r": 2}).encode(), TENSORS: save(tensors)}


def send(body: bytes, status: int = 200, **headers: str) -> Answer:
    """A plain answer. Headers are written with underscores."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        lengthy = {"Content_Length": str(len(body)), **headers}
        for key, value in lengthy.items():
            handler.send_header(key.replace("_", "-"), value)
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(body)

    return answer


class Remote:
    """``answers`` by path without its query; ``asked`` is every request as (path with query, headers)."""

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {}
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients hang up on purpose
        self.port: int = self.server.server_address[1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def secure(self, context: ssl.SSLContext) -> None:
        """From now on connections are TLS."""
        self.server.socket = context.wrap_socket(self.server.socket, server_side=True)

    def serve(self, folder: str, files: dict[str, bytes]) -> None:
        self.answers |= {f"{folder}/{name}": send(body) for name, body in files.items()}

    def paths(self) -> list[str]:
        return [path for path, _ in self.asked]


@pytest.fixture
def remote() -> Iterator[Remote]:
    remote = Remote()
    thread = threading.Thread(target=remote.server.serve_forever, args=(0.01,))
    thread.start()
    yield remote
    remote.server.shutdown()
    remote.server.server_close()
    thread.join()


def _handler(remote: Remote) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            remote.asked.append((self.path, dict(self.headers)))
            answer = remote.answers.get(self.path.partition("?")[0], send(b"", 404))
            try:
                answer(self)
            except OSError:  # the client hung up, as it should on much of this
                self.close_connection = True

        def do_HEAD(self) -> None:
            self.do_GET()

        def log_message(self, *args: object) -> None:
            pass

    return Handler


@dataclass
class Fetcher:
    """Fetches into a store of its own, and returns what came out of the stage."""

    store: BlobStore
    root: Path

    def __call__(self, sources: Sources, source: str, revision: str | None = None) -> tuple[Fetched, dict[str, bytes]]:
        with self.store.stage() as stage:
            fetched = sources.fetch(source, revision, stage)
            blob = stage.finish()
        return fetched, {file.name: file.read_bytes() for file in blob.path.iterdir()}

    def left_behind(self) -> list[Path]:
        return [*(self.root / "staging").iterdir(), *(self.root / "blobs").iterdir()]


@pytest.fixture
def fetch(tmp_path: Path) -> Fetcher:
    root = tmp_path / "store"
    return Fetcher(BlobStore(root, MAX_BYTES), root)

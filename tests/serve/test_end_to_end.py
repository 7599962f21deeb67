"""The demo as its users meet it: the real server, the real engine process, real clients."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from onebase.serve.demo import ADAPTERS, BASE, examples, matches

START_SECONDS = 120.0
Files = dict[str, bytes]


@dataclass(frozen=True)
class Server:
    url: str
    process: subprocess.Popen[bytes]
    http: httpx.Client

    @property
    def engine_pid(self) -> int:
        """The process the server started that runs the model."""
        children = psutil.Process(self.process.pid).children()
        return next(c.pid for c in children if "onebase.serve.engine.process" in " ".join(c.cmdline()))

    def wait_until(self, condition: Callable[[], bool], seconds: float = START_SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, "the server ended"
            assert time.monotonic() < deadline, "it took too long"
            time.sleep(0.05)

    def is_ready(self) -> bool:
        try:
            return self.http.get("/ready").status_code == 200
        except httpx.TransportError:
            return False

    def metric(self, name: str) -> float:
        lines = self.http.get("/metrics").text.splitlines()
        return float(next(line for line in lines if line.startswith(name)).rsplit(" ", 1)[1])

    def upload(self, name: str, files: Files) -> httpx.Response:
        parts = [("files", (file, data, "application/octet-stream")) for file, data in files.items()]
        return self.http.post("/v1/adapters", data={"name": name}, files=parts)

    def complete(self, model: str, prompt: str, **options: Any) -> httpx.Response:
        body = {"model": model, "prompt": prompt, "temperature": 0, "max_tokens": 12} | options
        return self.http.post("/v1/completions", json=body)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).parent / "onebase"), "demo", "--port", str(port)]
    command += ["--data-dir", str(tmp_path_factory.mktemp("data"))]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
    url = f"http://127.0.0.1:{port}"
    with httpx.Client(base_url=url, timeout=60) as http:
        server = Server(url, process, http)
        try:
            server.wait_until(server.is_ready)
            yield server
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def _ask(client: openai.OpenAI, model: str, question: str) -> str:
    answer = client.chat.completions.create(
        model=model, temperature=0, messages=[{"role": "user", "content": question}]
    )
    return answer.choices[0].message.content or ""


def test_every_adapter_answers_in_its_own_voice_beside_the_others(client: openai.OpenAI) -> None:
    models = [model.id for model in client.models.list()]
    assert models[0] == "onebase-demo"
    assert set(models[1:]) == set(ADAPTERS)
    jobs = [(model, question) for question in examples.values() for model in models]
    alone = [_ask(client, model, question) for model, question in jobs]
    with ThreadPoolExecutor(len(jobs)) as pool:
        together = list(pool.map(lambda job: _ask(client, *job), jobs))
    for (model, question), text in zip(jobs, alone, strict=True):
        assert matches("base" if model == "onebase-demo" else model, text), (model, question, text)
    for (model, question), text in zip(jobs, together, strict=True):
        assert matches("base" if model == "onebase-demo" else model, text), (model, question, text)


def test_a_streamed_chat_is_the_unstreamed_one(client: openai.OpenAI) -> None:
    for name, question in examples.items():
        stream = client.chat.completions.create(
            model=name,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            messages=[{"role": "user", "content": question}],
        )
        chunks = list(stream)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == _ask(client, name, question)
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens > 0


def _files(adapter: str) -> Files:
    return {path.name: path.read_bytes() for path in ADAPTERS[adapter].iterdir()}


def test_upload_use_and_unload(server: Server, client: openai.OpenAI) -> None:
    created = server.upload("loud", _files("shout"))
    assert created.status_code == 201, created.text
    assert created.json()["version"] == 1
    question = examples["shout"]
    assert _ask(client, "loud", question) == _ask(client, "shout", question)
    assert _ask(client, "loud@1", question) == _ask(client, "shout", question)
    replaced = server.upload("loud", _files("digits"))
    assert replaced.json()["version"] == 2
    assert matches("digits", _ask(client, "loud", examples["digits"]))
    assert _ask(client, "loud@1", question) == _ask(client, "shout", question)
    before = server.metric("onebase_adapter_bytes_used")
    assert server.http.delete("/v1/adapters/loud").status_code == 200
    assert server.complete("loud", "hello").status_code == 404
    assert server.metric("onebase_adapter_bytes_used") <= before
    assert server.http.post("/v1/unload_lora_adapter", json={"lora_name": "loud"}).status_code == 404


def _header(files: Files, change: Callable[[dict[str, Any]], None]) -> Files:
    """The adapter with its safetensors header changed by hand."""
    raw = files["adapter_model.safetensors"]
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    return files | {"adapter_model.safetensors": struct.pack("<Q", len(text)) + text + raw[8 + length :]}


def _config(files: Files, **change: Any) -> Files:
    config = json.loads(files["adapter_config.json"]) | change
    return files | {"adapter_config.json": json.dumps(config).encode()}


def _tensors(files: Files, folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Files:
    (folder / "t.safetensors").write_bytes(files["adapter_model.safetensors"])
    tensors = load_file(folder / "t.safetensors")
    change(tensors)
    save_file(tensors, folder / "t.safetensors")
    return files | {"adapter_model.safetensors": (folder / "t.safetensors").read_bytes()}


def _first(tensors: dict[str, torch.Tensor], suffix: str = "lora_A.weight") -> str:
    return next(key for key in tensors if key.endswith(suffix))


def _nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors[_first(tensors)][0, 0] = float("nan")


def _wrong_shape(tensors: dict[str, torch.Tensor]) -> None:
    key = _first(tensors)
    tensors[key] = tensors[key][:, :-1].contiguous()


def _half(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[_first(tensors, "lora_B.weight")]


def _no_module(tensors: dict[str, torch.Tensor]) -> None:
    key = _first(tensors)
    tensors[key.replace("layers.0.", "layers.99.")] = tensors.pop(key)


def _broken(folder: Path) -> dict[str, tuple[Files, str]]:
    """What is wrong -> (files, a word that the refusal has to say)."""
    good = _files("shout")
    weights = good["adapter_model.safetensors"]
    pickle = {"adapter_config.json": good["adapter_config.json"], "adapter_model.bin": b"\x80\x04K\x01."}

    def lie(header: dict[str, Any]) -> None:
        key = next(k for k in header if k != "__metadata__")
        header[key]["shape"][0] *= 2

    def terabyte(header: dict[str, Any]) -> None:
        key = next(k for k in header if k != "__metadata__")
        header[key] |= {"shape": [1 << 38], "data_offsets": [0, 1 << 40]}

    return {
        "a pickle": (pickle, "safetensors"),
        "truncated": (good | {"adapter_model.safetensors": weights[:-100]}, "adapter_model.safetensors"),
        "a lying header": (_header(good, lie), "size"),
        "a terabyte": (_header(good, terabyte), "adapter_model.safetensors"),
        "NaN": (_tensors(good, folder, _nan), "lora_A"),
        "a wrong shape": (_tensors(good, folder, _wrong_shape), "shape"),
        "a wrong rank": (_config(good, r=5), "rank"),
        "half an adapter": (_tensors(good, folder, _half), "lora_B"),
        "no such module": (_tensors(good, folder, _no_module), "layers.99"),
        "an unknown peft_type": (_config(good, peft_type="NOVEL"), "NOVEL"),
        "an unknown field that is on": (_config(good, use_novel_trick=True), "use_novel_trick"),
        "another depth": (_config(good, layer_replication=[[0, 2], [1, 3]]), "layer_replication"),
        "a config that is no JSON": (good | {"adapter_config.json": b"{"}, "adapter_config.json"),
        "no config": ({"adapter_model.safetensors": weights}, "adapter_config.json"),
    }


def test_broken_adapters_are_refused_with_the_reason(server: Server, client: openai.OpenAI, tmp_path: Path) -> None:
    for what, (files, word) in _broken(tmp_path).items():
        answer = server.upload("broken", files)
        assert 400 <= answer.status_code < 500, (what, answer.text)
        assert word in answer.json()["error"]["message"], (what, answer.text)
        assert server.complete("broken", "hello").status_code == 404, what
    for name in ("../e", "a,b", "x" * 5000, "a\nb", "é"):
        assert server.upload(name, _files("shout")).status_code == 400, name
    assert matches("shout", _ask(client, "shout", examples["shout"]))


def test_a_client_that_leaves_frees_its_place(server: Server) -> None:
    body = {"model": "shout", "prompt": "a", "max_tokens": 900, "ignore_eos": True, "stream": True}
    with server.http.stream("POST", "/v1/completions", json=body) as stream:
        lines = stream.iter_lines()  # kept: the connection closes with it
        next(lines)
        server.wait_until(lambda: server.metric("vllm:num_requests_running") >= 1)
    server.wait_until(lambda: server.metric("vllm:num_requests_running") == 0, 20)
    with pytest.raises(httpx.TimeoutException):
        server.http.post("/v1/completions", json=body | {"stream": False}, timeout=0.3)
    server.wait_until(lambda: server.metric("vllm:num_requests_running") == 0, 20)


def test_kill_9_of_the_engine_ends_streams_and_the_engine_comes_back(server: Server, client: openai.OpenAI) -> None:
    question = examples["json"]
    expected = _ask(client, "json", question)
    lines: list[str] = []
    started = threading.Event()

    def read() -> None:
        body = {"model": "json", "prompt": "a", "max_tokens": 1000, "ignore_eos": True, "stream": True}
        with server.http.stream("POST", "/v1/completions", json=body) as stream:
            for line in stream.iter_lines():
                lines.append(line)
                started.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert started.wait(30)
    os.kill(server.engine_pid, signal.SIGKILL)
    reader.join(30)
    assert not reader.is_alive()
    last = [line for line in lines if line][-1]
    assert "error" in json.loads(last.removeprefix("data: "))
    assert server.http.get("/health").status_code == 200
    assert server.http.get("/metrics").status_code == 200
    refused = server.complete("json", "a")
    if refused.status_code != 200:  # unless it was back already
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) > 0
    server.wait_until(server.is_ready)
    assert _ask(client, "json", question) == expected
    assert server.metric("onebase_engine_restarts_total") == 1


def test_a_base_that_cannot_be_served_ends_the_start_with_the_reason(tmp_path: Path) -> None:
    shutil.copytree(BASE, tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"model_type": "never-heard-of"}))
    command = [str(Path(sys.executable).parent / "onebase"), "serve", str(tmp_path / "base"), "--port", "0"]
    done = subprocess.run(command, capture_output=True, timeout=START_SECONDS, env=os.environ, check=False)
    assert done.returncode == 1
    assert b"never-heard-of" in done.stderr

"""Every family, option and the base in one batch of the real server, against HF PEFT: prompt and generated tokens."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from .case import ALL_FIVE, NUM_GREEDY, Made, all_cases, made

TOLERANCE = 1e-4
BASE = "base-model"


@dataclass(frozen=True)
class Server:
    http: httpx.Client
    process: subprocess.Popen[bytes]

    def total(self, counter: str) -> int:
        """A counter's sum over its labels."""
        lines = self.http.get("/metrics").text.splitlines()
        return sum(int(float(line.rsplit(" ", 1)[1])) for line in lines if line.startswith(counter))

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """The engine's process computes nothing; what is sent to it waits."""
        children = psutil.Process(self.process.pid).children()
        engine = next(c for c in children if "onebase.serve.engine.process" in " ".join(c.cmdline()))
        engine.suspend()
        try:
            yield
        finally:
            engine.resume()


def _with_tokenizer(base: Path, folder: Path) -> Path:
    """The checkpoint with a tokenizer of one word per id: the tests speak in ids, but a server needs one."""
    shutil.copytree(base, folder)
    words = {f"t{i}": i for i in range(128)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="t2").save_pretrained(folder)
    return folder


@contextmanager
def _serving(model: Path, data: Path) -> Iterator[Server]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).parent / "onebase"), "serve", str(model), "--port", str(port)]
    command += ["--served-model-name", BASE, "--dtype", "float32", "--data-dir", str(data), "--max-num-seqs", "512"]
    command += ["--max-batch-tokens", "16384", "--kv-memory", "0.2", "--adapter-memory", "0.2"]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        # Without a limit: over it the pool closes idle connections, sometimes under a thread that was just given one.
        unlimited = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120, limits=unlimited) as http:
            _wait(http, process)
            yield Server(http, process)
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


def _wait(http: httpx.Client, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while True:
        assert process.poll() is None, "the server ended"
        assert time.monotonic() < deadline, "it took too long"
        try:
            if http.get("/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)


def _upload(http: httpx.Client, name: str, folder: Path) -> None:
    parts = [
        ("files", (file.name, file.read_bytes()))
        for file in sorted(folder.iterdir())
        if file.name == "adapter_config.json" or file.suffix == ".safetensors"
    ]
    answer = http.post("/v1/adapters", data={"name": name}, files=parts)
    assert answer.status_code == 201, (name, answer.text)


def _ask(http: httpx.Client, model: str, prompt: list[int]) -> dict[str, Any]:
    body = {"model": model, "prompt": prompt, "max_tokens": NUM_GREEDY, "temperature": 0, "ignore_eos": True}
    answer = http.post("/v1/completions", json=body | {"logprobs": 1, "prompt_logprobs": 20})
    assert answer.status_code == 200, (model, answer.text)
    choice: dict[str, Any] = answer.json()["choices"][0]
    return choice


def _ask_all_at_once(server: Server, prompts: dict[str, list[int]]) -> dict[str, dict[str, Any]]:
    """The engine gets them together: it goes on once the server knows of all, however slowly the clients come."""
    before = server.total("onebase_requests_total")
    with ThreadPoolExecutor(len(prompts)) as pool:
        with server.stopped():
            answers = {name: pool.submit(_ask, server.http, name, prompt) for name, prompt in prompts.items()}
            while server.total("onebase_requests_total") - before < len(prompts):
                assert not any(answer.done() for answer in answers.values()), "one was answered by nobody"
                time.sleep(0.1)
        return {name: answer.result() for name, answer in answers.items()}


def _compare(name: str, choice: dict[str, Any], expected: Made) -> float:
    """The largest difference. Prompt: the twenty likeliest tokens after each position; then what was generated."""
    worst = 0.0
    for position, found in enumerate(choice["prompt_logprobs"][1:]):
        for token, entry in found.items():
            worst = max(worst, abs(entry["logprob"] - float(expected.logprobs[position, int(token)])))
    generated = choice["logprobs"]
    wanted = expected.tokens[expected.num_prompt :]
    assert [word.strip() for word in generated["tokens"]] == [f"t{token}" for token in wanted], name
    for at, (token, value) in enumerate(zip(wanted, generated["token_logprobs"], strict=True)):
        worst = max(worst, abs(value - float(expected.logprobs[expected.num_prompt - 1 + at, token])))
    return worst


@pytest.mark.parametrize("architecture", ALL_FIVE)
def test_all_families_in_one_batch(
    architecture: str, checkpoint: Callable[..., Path], families_cache: Path, tmp_path: Path
) -> None:
    base = checkpoint(architecture)
    cases = [case for case in all_cases() if architecture in case.architectures]
    expected = {case.name: made(case, architecture, base, families_cache, case.prompt) for case in cases}
    expected[BASE] = made(None, architecture, base, families_cache, list(range(5, 40, 2)))
    with _serving(_with_tokenizer(base, tmp_path / "model"), tmp_path / "data") as server:
        for case in cases:
            folder = expected[case.name].adapter
            assert folder is not None
            _upload(server.http, case.name, folder)
        before = server.total("onebase_engine_steps_total")
        answers = _ask_all_at_once(server, {name: made.prompt for name, made in expected.items()})
        steps = server.total("onebase_engine_steps_total") - before
    alone = len(expected) * NUM_GREEDY  # forwards, if each request had its own
    assert steps < alone / 4, f"{steps} forwards, {alone} one by one: they hardly met in a batch"
    worst = {name: _compare(name, answers[name], expected[name]) for name in expected}
    wrong = {name: value for name, value in worst.items() if value > TOLERANCE}
    assert not wrong, wrong

"""Peers: batches, the PEFT server, drivers against a stub, and rounds over the adapters that all of them serve."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

import httpx
import pytest
import torch
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from onebase.bench.cli import app as bench
from onebase.bench.load.workload import Workload
from onebase.bench.peers import drivers
from onebase.bench.peers.batcher import Batcher, Job
from onebase.bench.peers.drivers import NotStarted, Process, Stage
from onebase.bench.peers.peft_model import PeftModel
from onebase.bench.peers.peft_server import create_app
from onebase.bench.peers.run import Plan, compete, described
from onebase.bench.peers.stage import make_stage
from onebase.bench.quiet import Quiet

from .stub import Counting

STUB = Path(__file__).with_name("stub.py")


class Answer:
    """What a job got."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.end: Exception | None = None
        self.done = threading.Event()

    def __call__(self, token: int | Exception | None) -> None:
        if isinstance(token, int):
            self.tokens.append(token)
            return
        assert not self.done.is_set()
        self.end = token
        self.done.set()

    def wait(self) -> Answer:
        assert self.done.wait(30)
        return self


def ask(batcher: Batcher, tokens_out: int, adapter: str | None = None) -> Answer:
    answer = Answer()
    batcher.add(Job((1, 2, 3), tokens_out, adapter, answer))
    return answer


def test_a_batch_has_at_most_its_rows_and_each_row_its_own_length() -> None:
    model = Counting()
    batcher = Batcher(model.generate, 3, patience=5.0)
    answers = [ask(batcher, length) for length in (1, 4, 2, 3, 5, 1)]
    assert [answer.wait().tokens for answer in answers] == [list(range(3, 3 + n)) for n in (1, 4, 2, 3, 5, 1)]
    assert [len(batch) for batch in model.batches] == [3, 3]
    batcher.close()


def test_a_batch_that_fails_ends_its_answers_and_no_others() -> None:
    batcher = Batcher(Counting().generate, 1)
    assert isinstance(ask(batcher, 2, "broken").wait().end, RuntimeError)
    after = ask(batcher, 2).wait()
    assert (after.tokens, after.end) == ([3, 4], None)
    batcher.close()


def events(text: str) -> list[dict[str, object]]:
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]


def test_the_server_streams_tokens_and_usage_and_names_what_it_refuses() -> None:
    client = TestClient(create_app(Counting("odd"), 2))
    body = {"model": "base", "prompt": [1, 2], "max_tokens": 3, "temperature": 0, "stream": True}
    *pieces, usage = events(client.post("/v1/completions", json=body).text)
    assert [piece["choices"][0]["text"] for piece in pieces] == ["2 ", "3 ", "4 "]  # type: ignore[index]
    assert usage["usage"] == {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}
    assert client.post("/v1/completions", json=body | {"model": "nobody"}).status_code == 404
    assert client.post("/v1/completions", json=body | {"stream": False}).status_code == 400
    refused = client.post("/v1/load_lora_adapter", json={"lora_name": "odd", "lora_path": "/x"})
    assert (refused.status_code, "family that is not served" in refused.text) == (400, True)
    for name in ("fine", "broken"):
        assert client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": "/x"}).status_code == 200
    assert [card["id"] for card in client.get("/v1/models").json()["data"]] == ["base", "broken", "fine"]
    assert "not beside each other" in client.post("/v1/completions", json=body | {"model": "broken"}).text


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_rows_of_a_peft_batch_get_what_they_get_alone(tmp_path: Path) -> None:
    """Prompts of different lengths, over two adapters and the base; padding and neighbours change nothing."""
    stage = make_stage(tmp_path, "tiny", {"lora": 2}, 4, "float32")
    model = PeftModel(stage.model, torch.float32)
    for name, folder in stage.adapters.items():
        model.add(name, folder)
    prompts = [((5, 6, 7, 8, 9), "lora-0"), ((11, 12), "lora-1"), ((5, 6, 7, 8, 9), None), ((5, 6, 7, 8, 9), "lora-1")]

    def run(rows: list[tuple[tuple[int, ...], str | None]]) -> list[list[int]]:
        got: list[list[int]] = [[] for _ in rows]
        jobs = [Job(prompt, 6, adapter, lambda token: None) for prompt, adapter in rows]
        model.generate(jobs, lambda tokens: [one.append(token) for one, token in zip(got, tokens, strict=True)])  # type: ignore[func-returns-value,arg-type,return-value]
        return got

    together = run(prompts)
    assert together == [run([row])[0] for row in prompts]
    assert len({tuple(together[row]) for row in (0, 2, 3)}) > 1


def stub(name: str, *refused: str) -> Process:
    return Process(name, (sys.executable, "-P", str(STUB), "{port}", *refused))


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    adapters = {name: tmp_path / "adapters" / name for name in ("lora-0", "dora-0")}
    return Stage(tmp_path / "model", adapters, 8, 4, "float32", tmp_path)


def test_servers_get_the_same_requests_over_what_all_of_them_serve(stage: Stage) -> None:
    chosen = [
        stub("all"),
        stub("some", "dora-0"),
        stub("none", "lora-0", "dora-0"),
        Process("gone", ("no-such-command",)),
    ]
    plan = Plan(Workload(seconds=None, clients=2, requests=4, tokens_in="8", tokens_out="4"), rounds=1)
    outcome = compete(chosen, stage, plan, Quiet())
    data = described(outcome, plan, stage)
    assert outcome.common == ("lora-0",)
    assert data["refused"]["all"] == {}
    assert "family that is not served" in data["refused"]["some"]["dora-0"]
    assert set(data["refused"]["none"]) == {"lora-0", "dora-0"}
    assert "not installed" in data["refused"]["gone"]["all"]
    assert set(data["figures"]["base"]["tokens/s"]) == {"all", "some", "none"}
    assert set(data["figures"]["adapters"]["tokens/s"]) == {"all", "some"}
    assert data["figures"]["adapters"]["answered, % of offered"] == {"all": [100.0], "some": [100.0]}


def test_a_server_that_ends_is_told_with_its_log(stage: Stage) -> None:
    failing = Process("bad", (sys.executable, "-c", "import sys; sys.exit('no room ' + sys.argv[1])", "{port}"))
    with pytest.raises(NotStarted, match=r"bad: ended with status 1:\nno room \d+"), failing.serving(stage):
        pass


@pytest.mark.parametrize("name", drivers.DRIVERS)
def test_commands_are_filled_from_the_stage(name: str, stage: Stage) -> None:
    driver = drivers.DRIVERS[name]
    assert isinstance(driver, Process)
    command = driver._filled(stage, 4321)
    assert not any("{" in part for part in command)
    assert "4321" in command
    assert any(str(stage.model) in part for part in command)


def test_llama_cpp_says_why_it_takes_no_adapter(stage: Stage) -> None:
    with httpx.Client() as client:
        assert "GGUF" in (drivers.DRIVERS["llama.cpp"].load(client, "lora-0", stage.model) or "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--server", "nobody"], "allowed: ours, peft"),
        (["--at", "nowhere"], "NAME=URL"),
        (["--adapters", "lora=x"], "FAMILY=COUNT"),
        (["--shape", "huge"], "allowed shapes"),
    ],
)
def test_options_without_sense_are_refused(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(bench, ["peers", *arguments])
    assert done.exit_code == 2
    assert message in " ".join(done.output.replace("│", " ").split())

"""``onebase adapters`` against a running server, as operators and their scripts use it."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import Result
from typer.testing import CliRunner

from onebase.adapters.errors import AdapterRejected
from onebase.serve.adapter_commands.form import CHUNK_BYTES, AdapterForm
from onebase.serve.cli import app

from .conftest import serving

KEY = "secret"
Run = Callable[..., Result]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing on stderr, where the tests look."""


@contextmanager
def listening(handler: Any) -> Iterator[str]:
    """An HTTP server in a thread; its address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()


@pytest.fixture(scope="module")
def remote(make_lora: Any) -> Iterator[str]:
    """An address from which the server may fetch an adapter."""
    with listening(partial(Quiet, directory=str(make_lora(9)))) as url:
        yield url


@pytest.fixture(scope="module")
def server(
    tiny_base: Path, remote: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[psutil.Process, str]]:
    """The process and its address."""
    folder = tmp_path_factory.mktemp("adapter-cli")
    options = ["serve", str(tiny_base), "--port", "0", "--device", "cpu", "--data-dir", str(folder / "data")]
    options += ["--api-key", "user", "--admin-key", KEY, "--allow-url", remote]
    with serving(*options, folder=folder) as (process, address):
        yield psutil.Process(process.pid), address


@pytest.fixture(scope="module")
def url(server: tuple[psutil.Process, str]) -> str:
    return server[1]


def invoke(*arguments: str, url: str, key: str | None = KEY) -> Result:
    environment = {"ONEBASE_URL": url, "ONEBASE_ADMIN_KEY": key, "NO_COLOR": "1", "TERM": "dumb"}
    return CliRunner().invoke(app, ["adapters", *arguments], env=environment)


@pytest.fixture
def onebase(url: str) -> Run:
    """Runs a command that has to succeed; what it printed, as JSON where it was asked for."""

    def run(*arguments: str) -> Any:
        done = invoke(*arguments, url=url)
        assert done.exit_code == 0, (arguments, done.output)
        assert not done.stderr
        return json.loads(done.stdout) if "--json" in arguments else done.stdout

    return run


def test_the_life_of_an_adapter(onebase: Run, make_lora: Any) -> None:
    card = onebase("push", "sql", str(make_lora(1)), "--json")
    assert (card["name"], card["version"], card["source"], card["by"]) == ("sql", 1, "upload", "admin")
    assert onebase("push", "sql", str(make_lora(2)), "--json")["version"] == 2
    assert "sql" in onebase("ls")
    (listed,) = onebase("ls", "--prefix", "sql", "--json")
    assert listed["version"] == 2
    assert onebase("label", "sql", "team=x", "env=prod", "--json")["labels"] == {"team": "x", "env": "prod"}
    assert onebase("label", "sql", "env-", "--json")["labels"] == {"team": "x"}
    assert [card["name"] for card in onebase("ls", "--label", "team=x", "--json")] == ["sql"]
    assert onebase("ls", "--label", "team=y", "--json") == []
    assert onebase("alias", "sql", "stable=1", "edge=current", "--json")["aliases"] == ["edge", "stable"]
    assert onebase("show", "stable", "--json")["version"] == 1
    assert onebase("alias", "sql", "stable-", "--json")["aliases"] == ["edge"]
    assert onebase("pin", "sql", "--json")["pinned"] is True
    assert [card["name"] for card in onebase("ls", "--pinned", "--json")] == ["sql"]
    assert onebase("unpin", "sql", "--json")["pinned"] is False
    assert onebase("rollback", "sql", "--json")["version"] == 1
    assert onebase("rollback", "sql", "2", "--json")["version"] == 2
    assert [(card["version"], card["current"]) for card in onebase("versions", "sql", "--json")] == [
        (1, False),
        (2, True),
    ]
    assert onebase("load", "sql", "--json")["tier"] == "device"
    assert onebase("unload", "sql", "--json")["was_resident"] is True
    assert onebase("unload", "sql", "--force", "--no-wait", "--json")["name"] == "sql"
    onebase("rollback", "sql", "1")
    onebase("push", "sql", str(make_lora(8)))
    assert onebase("gc", "--keep", "0", "--dry-run", "--json")["versions"] == ["sql@2"]
    assert onebase("gc", "--keep", "0", "--json")["versions"] == ["sql@2"]
    assert onebase("rm", "sql", "--force", "--json")["deleted"] is True
    assert onebase("ls", "--prefix", "sql", "--json") == []


def test_what_people_read(onebase: Run, make_lora: Any) -> None:
    onebase("push", "read", str(make_lora(3)))
    title, row = onebase("ls", "--prefix", "read").splitlines()
    assert title.split()[:3] == ["NAME", "VERSION", "STATE"]
    assert row.split()[:5] == ["read", "1", "ready", "LORA", "2"]
    shown = onebase("show", "read")
    assert "family:" in shown
    assert "LORA" in shown
    assert "upload" in onebase("versions", "read")
    onebase("rm", "read")


def test_lists_go_through_all_pages(onebase: Run, make_lora: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onebase.serve.adapter_commands.client.PAGE", 2)
    folder = make_lora(4)
    names = [f"page{index}" for index in range(5)]
    for name in names:
        onebase("push", name, str(folder))
    assert [card["name"] for card in onebase("ls", "--prefix", "page", "--json")] == names
    assert [card["name"] for card in onebase("ls", "--prefix", "page", "--limit", "3", "--json")] == names[:3]
    for name in names:
        onebase("rm", name)


def test_the_server_fetches_what_has_a_scheme(onebase: Run, url: str, remote: str) -> None:
    card = onebase("push", "far", remote, "--json")
    assert (card["version"], card["source"], card["state"]) == (1, remote, "ready")
    later = onebase("push", "later", remote, "--no-wait", "--json")
    assert later["state"] in {"fetching", "checking"}
    done = invoke("push", "far", "https://example.com/x", url=url)
    assert (done.exit_code, done.stdout) == (1, "")
    assert "--allow-url" in done.stderr
    for name in ("far", "later"):
        while invoke("rm", name, url=url).exit_code:
            pass


def test_a_pinned_adapter_is_back_after_the_engine_died(
    server: tuple[psutil.Process, str], onebase: Run, make_lora: Any
) -> None:
    onebase("push", "kept", str(make_lora(7)))
    onebase("push", "lost", str(make_lora(8)))
    onebase("pin", "kept")
    (engine,) = [child for child in server[0].children() if "onebase.serve.engine.process" in " ".join(child.cmdline())]
    engine.kill()
    while onebase("show", "kept", "--json")["tier"] == "device":
        pass
    deadline = time.monotonic() + 120
    while onebase("show", "kept", "--json")["tier"] != "device":
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert onebase("show", "lost", "--json")["tier"] == "disk"
    for name in ("kept", "lost"):
        onebase("rm", name)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["show", "nope"], "There is no adapter 'nope'."),
        (["show", "../nope"], "not an adapter name"),
        (["show", "nope,"], "not an adapter name"),
        (["show", "a/versions"], "not an adapter name"),
        (["show", ""], "not an adapter name"),
        (["rollback", "nope"], "nope"),
        (["rm", "nope"], "nope"),
        (["push", "../e", "{lora}"], "not an adapter name"),
        (["push", "tiny", "{lora}"], "the base model"),
        (["push", "a", "{empty}"], "adapter_config.json"),
        (["push", "a", "/no/such/folder"], "neither a folder"),
        (["push", "a", "{lora}", "--no-wait"], "--no-wait"),
        (["push", "a", "{lora}", "--revision", "main"], "--revision"),
        (["ls", "--state", "odd"], "state"),
    ],
)
def test_refusals_are_one_line_on_stderr(
    url: str, make_lora: Any, tmp_path: Path, arguments: list[str], said: str
) -> None:
    given = [argument.format(lora=make_lora(5), empty=tmp_path) for argument in arguments]
    done = invoke(*given, url=url)
    assert (done.exit_code, done.stdout) == (1, "")
    assert said in done.stderr
    assert done.stderr.startswith("onebase: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [["label", "a", "x"], ["alias", "a", "x=y"], ["ls", "--label", "x"], ["gc", "--keep", "-1"]]
)
def test_what_is_wrong_at_first_sight_asks_no_server(arguments: list[str]) -> None:
    done = invoke(*arguments, url="http://127.0.0.1:9")
    assert done.exit_code == 2


@pytest.mark.parametrize(("key", "said"), [(None, "ONEBASE_ADMIN_KEY"), ("wrong", "API key"), ("user", "admin key")])
def test_keys(url: str, key: str | None, said: str) -> None:
    done = invoke("ls", url=url, key=key)
    assert done.exit_code == 1
    assert said in done.stderr


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "http://[::1]:9", "nonsense", "http://", "ftp://127.0.0.1"])
def test_no_server_is_said_plainly(url: str) -> None:
    done = invoke("ls", url=url)
    assert (done.exit_code, done.stdout) == (1, "")
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("onebase: ")


class Other(Quiet):
    """Answers 200 to everything, but is no OneBase."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"[]" if self.path.endswith("/list") else b"<html>")


@pytest.mark.parametrize("name", ["page", "list"])
def test_an_answer_of_another_server_is_said_plainly(name: str) -> None:
    with listening(Other) as url:
        done = invoke("show", name, url=url)
    assert (done.exit_code, done.stdout) == (1, "")
    assert "not as a OneBase server does" in done.stderr


class Slow(Quiet):
    def do_DELETE(self) -> None:
        if "force=true" in self.path:
            time.sleep(0.5)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"{}")


def test_a_removal_by_force_waits_for_the_requests_that_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onebase.serve.adapter_commands.client.READ_SECONDS", 0.1)
    with listening(Slow) as url:
        assert invoke("rm", "a", url=url).exit_code == 0
        done = invoke("rm", "a", "--force", url=url)
    assert (done.exit_code, done.stderr) == (0, "")


class Hostile(BaseHTTPRequestHandler):
    """Answers with what a terminal would obey, or with what is no JSON at all."""

    def do_GET(self) -> None:
        card = json.loads(
            '{"name": "\\u001b[31m", "version": 1, "state": "[bold]x", "family": "\\u0007", "rank": 1, "bytes": 1, '
            '"tier": "disk", "pinned": false, "uses": 0, "labels": {}}'
        )
        error = {"error": {"message": "\x1b]0;owned\x07\nsecond line", "param": None}}
        bodies = {"/v1/adapters": {"data": [card], "has_more": False, "next": None}, "/v1/adapters/e": error}
        found = bodies.get(self.path.partition("?")[0])
        self.send_response(500 if found is None else 400 if found is error else 200)
        self.end_headers()
        self.wfile.write(b"<html>" if found is None else json.dumps(found).encode())

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing on stderr, where the tests look."""


def test_commands_that_only_ask_do_not_wait_for_torch() -> None:
    lines = "import sys, onebase.serve.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", lines], check=False).returncode == 0


def test_answers_have_no_power_over_the_terminal() -> None:
    with listening(Hostile) as url:
        listed, refused, broken = (invoke(*words, url=url) for words in (["ls"], ["show", "e"], ["show", "x"]))
    assert "\x1b" not in listed.stdout + refused.stderr
    assert "[bold]x" in listed.stdout
    assert refused.stderr.count("\n") == 1
    assert "answered 500" in broken.stderr


def test_a_form_is_as_long_as_it_says_and_never_whole_in_memory(make_lora: Any) -> None:
    folder = make_lora(6)
    (folder / "more.safetensors").write_bytes(b"\x00" * (5 * CHUNK_BYTES + 3))
    (folder / "README.md").write_text("is not sent")
    sent: list[int] = []
    form = AdapterForm("a", folder, sent.append)
    chunks = list(form.chunks())
    assert sum(map(len, chunks)) == form.nbytes == sum(sent)
    assert max(map(len, chunks)) <= CHUNK_BYTES
    assert b"README" not in b"".join(chunks)


def test_a_form_of_no_adapter_is_refused_before_it_is_sent(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(AdapterRejected, match="pickle"):
        _ = AdapterForm("a", tmp_path).nbytes

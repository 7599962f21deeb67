"""Gauges, tenants, the choice of models, the plan's shares of processes, and what the terminal shows."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from onebase.bench.load.live import Lines, Recent, bars, view
from onebase.bench.load.processes import deal
from onebase.bench.load.requests import Target
from onebase.bench.load.server import Discovered, ServerUnusable, choose
from onebase.bench.load.tenants import Sender, read_senders
from onebase.bench.load.timeline import parse
from onebase.bench.load.worker import Assignment, Progress
from onebase.bench.load.workload import Workload


def test_gauges_of_several_servers_have_one_name() -> None:
    ours = 'vllm:num_requests_running 3\nonebase_adapter_tier_bytes{tier="host"} 1024\n# HELP x\nother 4\n'
    assert parse(ours) == {"running": 3.0, "tier_host_bytes": 1024.0}
    theirs = 'vllm:num_requests_running{engine="0"} 3.0\nvllm:num_requests_running{engine="1"} 2.0\n'
    assert parse(theirs + "tgi_queue_size nan\nllamacpp:requests_deferred many\n") == {"running": 5.0}


def test_tenants_are_read(tmp_path: Path) -> None:
    path = tmp_path / "t.toml"
    path.write_text('[[tenant]]\nname = "a"\nkey = "k"\nshare = 2\n')
    assert read_senders(path) == (Sender("a", "k", 2),)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "at least one table"),
        ("x = [", "tenants: "),
        ("tenant = 3", "at least one table"),
        ('[[tenant]]\nname = "a"', "name and key are needed"),
        ('[[tenant]]\nname = "a"\nkey = "k"\nweight = 1', "share is allowed"),
        ('[[tenant]]\nname = "a"\nkey = "k\\r\\nx: y"', "key: printable"),
        ('[[tenant]]\nname = "a"\nkey = "k"\nshare = 0', "share: a number"),
        ('[[tenant]]\nname = "a"\nkey = "k"\nshare = inf', "share: a number"),
        ('[[tenant]]\nname = 3\nkey = "k"', "texts"),
        ('[[tenant]]\nname = "a"\nkey = "k"\n[[tenant]]\nname = "a"\nkey = "l"', "names must differ"),
    ],
)
def test_tenants_that_are_none_are_refused_by_field(text: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "t.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=told):
        read_senders(path)


FOUND = Discovered("base", ("a", "b", "c"), None, 0)


def test_models_are_chosen() -> None:
    assert choose(FOUND, None, None, ()) == ("a", "b", "c")
    assert choose(FOUND, None, 2, ()) == ("a", "b")
    assert choose(FOUND, None, 0, ()) == ("base",)
    assert choose(FOUND, "other", None, ()) == ("other",)
    assert choose(FOUND, None, None, ("z",)) == ("z",)
    with pytest.raises(ServerUnusable, match="4 asked for; the server names 3"):
        choose(FOUND, None, 4, ())
    with pytest.raises(ServerUnusable, match="model: "):
        choose(Discovered("", (), None, 0), None, None, ())


@pytest.mark.parametrize("clients", [0, 2, 5])
def test_processes_share_plan_and_clients(clients: int) -> None:
    plan = tuple(Workload(rate=1.0, seconds=10.0).plan(["m"]))
    shares = deal(Assignment(Target("http://h"), ("",), plan, clients, None), 3)
    assert sorted(one.number for share in shares for one in share.plan) == list(range(10))
    assert sum(share.clients for share in shares) == clients
    assert all(share.clients for share in shares) or not clients


def progress(tokens: int) -> Progress:
    return Progress(sent=5, ok=2, rejected=1, tokens=tokens, first=[0.5], last_error="429: busy")


def test_rates_are_of_the_last_seconds() -> None:
    recent = Recent()
    for second in range(1, 31):
        recent.add(float(second), progress(100 * second))
    assert recent.rate("tokens") == pytest.approx(100.0)
    assert recent.ttft(50) == 0.5
    assert list(recent.rates)[1:] == pytest.approx([100.0] * 29)


def test_without_a_terminal_there_is_a_line_now_and_then() -> None:
    text = io.StringIO()
    with view(Console(file=text, width=200), "t") as shown:
        assert isinstance(shown, Lines)
        for quarter in range(41):
            shown.update(quarter / 4, progress(quarter), {})
    lines = text.getvalue().splitlines()
    assert len(lines) == 2
    assert "sent 5, under way 2, ok 2, rejected 1" in lines[0]


def test_a_terminal_shows_counts_gauges_and_errors() -> None:
    console = Console(file=io.StringIO(), width=160, force_terminal=True)
    with view(console, "t") as shown:
        shown.update(1.0, progress(10), {"t": 1.0, "running": 3.0, "kv_cache_usage": 0.5})
        panel = shown._panel(1.0, progress(10), {"t": 1.0, "running": 3.0, "kv_cache_usage": 0.5})  # type: ignore[attr-defined]
    with console.capture() as captured:
        console.print(panel)
    assert all(word in captured.get() for word in ("running", "50%", "429: busy", "TTFT"))


def test_bars_are_as_high_as_their_values() -> None:
    assert bars([0.0, 4.0, 8.0]) == " ▄█"
    assert bars([]) == ""

"""The same requests to every server, in rounds: over the base alone, and over the adapters that all of them serve.

Servers run beside each other and take turns within a round, so that what drifts meets all alike; or one after the
other, where the machine cannot hold them together. A server without any of the adapters takes part over the base alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import httpx

from onebase.bench.http_server import BASE
from onebase.bench.load.options import Options
from onebase.bench.load.result import LoadResult
from onebase.bench.load.run import View, run
from onebase.bench.load.workload import Workload
from onebase.bench.peers.drivers import Driver, NotStarted, Stage
from onebase.bench.report import machine

Refusals = dict[str, str]  # adapter -> why


@dataclass(frozen=True, slots=True)
class Plan:
    """rounds: counted ones; one more warms every server up."""

    workload: Workload
    rounds: int = 3
    interleaved: bool = True
    timeout: float = 600.0


@dataclass(slots=True)
class Peer:
    """A server that is up. runs: over "base" and "adapters", a round each."""

    name: str
    url: str
    refused: Refusals
    version: str = ""
    runs: dict[str, list[LoadResult]] = field(default_factory=lambda: {"base": [], "adapters": []})


@dataclass(frozen=True, slots=True)
class Outcome:
    """absent: server -> why it did not take part. common: the adapters of the runs."""

    peers: Sequence[Peer]
    absent: Mapping[str, str]
    common: tuple[str, ...]


def compete(drivers: Sequence[Driver], stage: Stage, plan: Plan, view: View) -> Outcome:
    """Raises load.server.ServerUnusable and load.processes.WorkerDied."""
    return (_together if plan.interleaved else _in_turn)(drivers, stage, plan, view)


def _together(drivers: Sequence[Driver], stage: Stage, plan: Plan, view: View) -> Outcome:
    absent: dict[str, str] = {}
    with ExitStack() as servers:
        peers = list(_started(drivers, stage, servers, absent))
        common = _common(stage, [peer.refused for peer in peers])
        for number in range(-1, plan.rounds):
            for peer in peers:
                _round(peer, common, plan, number, view)
    return Outcome(peers, absent, common)


def _in_turn(drivers: Sequence[Driver], stage: Stage, plan: Plan, view: View) -> Outcome:
    """Each is started twice: first to learn what it refuses, since that decides about the others' requests."""
    absent: dict[str, str] = {}
    peers = list[Peer]()
    for driver in drivers:
        with ExitStack() as server:
            peers += _started([driver], stage, server, absent)
    common = _common(stage, [peer.refused for peer in peers])
    found = {peer.name: peer for peer in peers}
    for driver in drivers:
        if driver.name in found:
            with ExitStack() as server:
                for again in _started([driver], stage, server, absent):
                    found[driver.name].url = again.url
                    for number in range(-1, plan.rounds):
                        _round(found[driver.name], common, plan, number, view)
    return Outcome(peers, absent, common)


def _started(drivers: Sequence[Driver], stage: Stage, servers: ExitStack, absent: dict[str, str]) -> Iterator[Peer]:
    for driver in drivers:
        try:
            url = servers.enter_context(driver.serving(stage))
        except NotStarted as error:
            absent[driver.name] = str(error)
            continue
        with httpx.Client(base_url=url, timeout=600, trust_env=False) as client:
            refused = {
                name: why for name, folder in stage.adapters.items() if (why := _brought(driver, client, name, folder))
            }
            yield Peer(driver.name, url, refused, _version(client))


def _brought(driver: Driver, client: httpx.Client, name: str, folder: Any) -> str | None:
    """Loaded, and asked for one token; else why not."""
    try:
        return driver.load(client, name, folder) or probe(client, name)
    except httpx.HTTPError as error:
        return f"{type(error).__name__}: {error}"


def probe(client: httpx.Client, model: str) -> str | None:
    """One token, streamed, since that is what is asked for later; the reason where none comes."""
    body = {"model": model, "prompt": "one", "max_tokens": 1, "temperature": 0, "stream": True}
    answer = client.post("/v1/completions", json=body)
    if answer.status_code != 200:
        return f"{answer.status_code}: {answer.text[:500]}"
    if '"error"' in answer.text:
        return f"in the stream: {answer.text.strip()[:500]}"
    return None if '"text"' in answer.text else f"a stream without a token: {answer.text.strip()[:500]}"


def _version(client: httpx.Client) -> str:
    answer = client.get("/version")
    try:
        return str(answer.json()["version"]) if answer.status_code == 200 else ""
    except (ValueError, KeyError, TypeError):
        return ""


def _common(stage: Stage, refusals: Sequence[Refusals]) -> tuple[str, ...]:
    """What every server has that has any."""
    able = [refused for refused in refusals if len(refused) < len(stage.adapters)]
    return tuple(name for name in stage.adapters if able and not any(name in refused for refused in able))


def _round(peer: Peer, common: tuple[str, ...], plan: Plan, number: int, view: View) -> None:
    sides = {"base": (BASE,)} | ({"adapters": common} if common and not peer.refused.keys() >= set(common) else {})
    for side, names in sides.items():
        workload = replace(plan.workload, seed=plan.workload.seed + max(number, 0))
        options = Options(peer.url, workload, names=names, timeout=plan.timeout)
        result = asyncio.run(run(options, view, machine()))
        if number >= 0:
            peer.runs[side].append(result)


def described(outcome: Outcome, plan: Plan, stage: Stage) -> dict[str, Any]:
    """What is stored."""
    return {
        "workload": asdict(plan.workload),
        "plan": {
            "rounds": plan.rounds,
            "interleaved": plan.interleaved,
            "rows": stage.rows,
            "dtype": stage.dtype,
            "model": stage.model.parent.name,
            "adapters": len(outcome.common),
            "versions": {peer.name: peer.version for peer in outcome.peers},
        },
        "refused": {peer.name: peer.refused for peer in outcome.peers}
        | {n: {"all": w} for n, w in outcome.absent.items()},
        "figures": {side: _figures(outcome.peers, side) for side in ("base", "adapters")},
    }


def _figures(peers: Sequence[Peer], side: str) -> dict[str, dict[str, list[float]]]:
    """metric -> server -> rounds."""
    found = dict[str, dict[str, list[float]]]()
    for peer in peers:
        for result in peer.runs[side]:
            for metric, value in _metrics(result).items():
                found.setdefault(metric, {}).setdefault(peer.name, []).append(value)
    return found


def _metrics(result: LoadResult) -> dict[str, float]:
    summary = result.summary
    metrics = {
        "tokens/s": summary.tokens_per_second,
        "answered, % of offered": 100 * summary.ok / max(summary.offered, 1),
    }
    for name, stats in (("TTFT", summary.ttft), ("ITL", summary.itl), ("E2E", summary.e2e)):
        if stats is not None:
            metrics |= {f"{name} p50, ms": 1e3 * stats.p50, f"{name} p99, ms": 1e3 * stats.p99}
    return metrics

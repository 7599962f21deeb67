"""`onebase bench load`, and `onebase bench client`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from onebase.bench.load.options import Options
    from onebase.bench.load.result import LoadResult, Measures, Stats

_OPEN, _CLOSED, _WHAT, _WHO, _HOW = "Open loop", "Closed loop", "What is asked", "Who asks", "How it is measured"


def load(
    url: Annotated[str, typer.Option(help="Any server that speaks the OpenAI protocol: http[s]://HOST[:PORT].")],
    rate: Annotated[float, typer.Option(help="Requests a second.", rich_help_panel=_OPEN)] = 1.0,
    seconds: Annotated[
        float | None, typer.Option(help="How long requests are sent.  [default: 60 in an open loop]")
    ] = None,
    arrivals: Annotated[
        str, typer.Option(help="poisson, gamma:CV, even, bursts:SIZE, ramp:FROM.", rich_help_panel=_OPEN)
    ] = "poisson",
    trace: Annotated[
        Path | None,
        typer.Option(
            help="Replay: CSV or JSONL of time, adapter, tokens_in, tokens_out, or Azure's, BurstGPT's, Mooncake's.",
            rich_help_panel=_OPEN,
        ),
    ] = None,
    speed: Annotated[float, typer.Option(help="Of the trace's clock.", rich_help_panel=_OPEN)] = 1.0,
    clients: Annotated[
        int, typer.Option(help="Each sends its next request when its last one is done.", rich_help_panel=_CLOSED)
    ] = 0,
    requests: Annotated[int, typer.Option(help="Of all clients together.", rich_help_panel=_CLOSED)] = 0,
    model: Annotated[str | None, typer.Option(help="The base alone, by name.", rich_help_panel=_WHAT)] = None,
    adapters: Annotated[
        int | None,
        typer.Option(help="The first so many of /v1/models; 0: the base.  [default: all]", rich_help_panel=_WHAT),
    ] = None,
    adapter: Annotated[
        list[str] | None, typer.Option(help="An adapter by name; may be repeated.", rich_help_panel=_WHAT)
    ] = None,
    popularity: Annotated[
        str,
        typer.Option(help="power:ALPHA (S-LoRA's), zipf:S, uniform, distinct, identical.", rich_help_panel=_WHAT),
    ] = "uniform",
    tokens_in: Annotated[
        str, typer.Option(help="N, LOW:HIGH (not reached), lognormal:MEDIAN:SIGMA:MOST.", rich_help_panel=_WHAT)
    ] = "128",
    tokens_out: Annotated[str, typer.Option(help="As --tokens-in.", rich_help_panel=_WHAT)] = "64",
    shared_prefix: Annotated[
        int, typer.Option(help="Tokens that prompts of one group begin with.", rich_help_panel=_WHAT)
    ] = 0,
    prefix_groups: Annotated[int, typer.Option(help="Such groups.", rich_help_panel=_WHAT)] = 1,
    endpoint: Annotated[str, typer.Option(help="completions or chat.", rich_help_panel=_WHAT)] = "completions",
    vocabulary: Annotated[
        int | None,
        typer.Option(help="Prompts are ids below it; 0: words.  [default: as /tokenizer_info]", rich_help_panel=_WHAT),
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option(help="Ask for answers of exactly the planned length.", rich_help_panel=_WHAT)
    ] = True,
    cancel: Annotated[
        float, typer.Option(help="Share of the requests that the client breaks off.", rich_help_panel=_WHAT)
    ] = 0.0,
    churn: Annotated[
        float, typer.Option(help="Changes of adapters a second: upload, replace, unload.", rich_help_panel=_WHAT)
    ] = 0.0,
    churn_folder: Annotated[
        Path | None,
        typer.Option(help="The adapter to upload; without it, unloads alone.", rich_help_panel=_WHAT),
    ] = None,
    key: Annotated[
        str, typer.Option(envvar="ONEBASE_API_KEY", help="Bearer key of the requests.", rich_help_panel=_WHO)
    ] = "",
    admin_key: Annotated[
        str, typer.Option(envvar="ONEBASE_ADMIN_KEY", help="Of changes to adapters.", rich_help_panel=_WHO)
    ] = "",
    tenants: Annotated[
        Path | None,
        typer.Option(help="TOML: [[tenant]] tables of name, key, share.", rich_help_panel=_WHO),
    ] = None,
    slo: Annotated[str, typer.Option(help="Such as ttft=6s,tpot=100ms; also itl, e2e.", rich_help_panel=_HOW)] = "",
    warm_up: Annotated[float, typer.Option(help="Seconds not measured, at the start.", rich_help_panel=_HOW)] = 0.0,
    tail: Annotated[float, typer.Option(help="Seconds not measured, at the end.", rich_help_panel=_HOW)] = 0.0,
    processes: Annotated[int, typer.Option(help="Of the client.", rich_help_panel=_HOW)] = 1,
    timeout: Annotated[float, typer.Option(help="Seconds for one request.", rich_help_panel=_HOW)] = 600.0,
    seed: Annotated[int, typer.Option(help="The same seed, the same requests.", rich_help_panel=_HOW)] = 42,
    out: Annotated[
        Path | None, typer.Option(help="Store all as JSON, a report beside it.", rich_help_panel=_HOW)
    ] = None,
) -> None:
    """Load on any server: latencies, throughput, goodput; by adapter and by tenant."""
    arguments = dict(locals())
    del arguments["out"]
    try:
        options = _options(**arguments)
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from None
    result = _run(options)
    show(result)
    if out is not None:
        from onebase.bench.reports.write import write_report

        result.write(out)
        print(out, *write_report(out), sep="\n")


def client(
    streams: Annotated[int, typer.Option(help="At once.", min=1)] = 256,
    tokens: Annotated[int, typer.Option(help="Of each.", min=2)] = 400,
    gap: Annotated[float, typer.Option(help="Milliseconds between a stream's tokens.", min=0.1)] = 10.0,
    processes: Annotated[int, typer.Option(min=1)] = 1,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    out: Annotated[Path | None, typer.Option(help="Store the figures as JSON.")] = None,
) -> None:
    """How much the load client itself can take: streams from a server that only keeps time."""
    from onebase.bench.load.capacity import Case
    from onebase.bench.load.capacity import show as show_capacity

    show_capacity(Case(streams, tokens, gap / 1000, processes), rounds, out)


def _options(
    *,
    adapter: list[str] | None,
    churn: float,
    churn_folder: Path | None,
    tenants: Path | None,
    slo: str,
    seconds: float | None,
    **others: Any,
) -> Options:
    """Raises ValueError and OSError for what is not allowed."""
    from dataclasses import fields

    from onebase.bench.load.churn import ChurnPlan
    from onebase.bench.load.http import Address
    from onebase.bench.load.options import Options
    from onebase.bench.load.slo import Slo
    from onebase.bench.load.tenants import Sender, read_senders
    from onebase.bench.load.workload import Workload

    Address.parse(others["url"])
    if churn < 0 or (churn_folder is not None and not churn):
        raise ValueError("churn: changes a second, at least 0; needed with --churn-folder")
    of_workload = {item.name for item in fields(Workload)}
    if seconds is None and not others["clients"] and others["trace"] is None:
        seconds = 60.0
    return Options(
        workload=Workload(seconds=seconds, **{name: others[name] for name in of_workload & others.keys()}),
        names=tuple(adapter or ()),
        senders=read_senders(tenants) if tenants else (Sender(),),
        slo=Slo.parse(slo),
        churn=ChurnPlan(churn, churn_folder, others["seed"]) if churn else None,
        **{name: value for name, value in others.items() if name not in of_workload},
    )


def _run(options: Options) -> LoadResult:
    import asyncio

    from rich.console import Console

    from onebase.bench.load.live import view
    from onebase.bench.load.processes import WorkerDied
    from onebase.bench.load.run import run
    from onebase.bench.load.server import ServerUnusable
    from onebase.bench.report import machine

    told = machine()
    try:
        with view(Console(stderr=True), options.url) as shown:
            return asyncio.run(run(options, shown, told))
    except (ServerUnusable, WorkerDied, ValueError, OSError) as error:
        print(f"Error: {error}")
        raise typer.Exit(1) from None


def show(result: LoadResult) -> None:
    """The summary, and what is wrong with it."""
    from rich.console import Console
    from rich.table import Table

    summary, console = result.summary, Console()
    table = Table(title=f"{result.server.url}, {result.seconds:.1f} s")
    for column in ("", "mean", "p50", "p90", "p95", "p99"):
        table.add_column(column, justify="right" if column else "left")
    for name in ("ttft", "tpot", "itl", "e2e"):
        table.add_row(f"{name.upper()}, ms", *_milliseconds(getattr(summary, name)))
    console.print(table)
    console.print(_counts(summary), highlight=False)
    console.print(
        f"{summary.tokens_per_second:.1f} tokens/s, {summary.requests_per_second:.2f} requests/s; goodput "
        f"{summary.goodput:.2f} requests/s, attainment {summary.attainment:.1%} of all offered",
        highlight=False,
    )
    for name, measures in summary.per_tenant.items() if len(summary.per_tenant) > 1 else ():
        console.print(f"{name or 'no tenant'}: {_counts(measures)}, attainment {measures.attainment:.1%}")
    for error, count in Counter(record.error for record in result.requests if record.error).most_common(3):
        console.print(f"{count} times: {error}", style="red", highlight=False, markup=False)
    for warning in result.client.warnings:
        console.print(f"Take care: {warning}.", style="yellow")


def _counts(measures: Measures) -> str:
    shown = ("offered", "ok", "rejected", "failed", "cancelled")
    return ", ".join(f"{name} {getattr(measures, name)}" for name in shown)


def _milliseconds(stats: Stats | None) -> list[str]:
    if stats is None:
        return ["-"] * 5
    return [f"{value * 1000:.1f}" for value in (stats.mean, stats.p50, stats.p90, stats.p95, stats.p99)]

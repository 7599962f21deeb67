"""`onebase bench ...`: every command prints both sides of what it compares."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from onebase.bench.load.command import client, load
from onebase.bench.peers.command import peers
from onebase.bench.reports import commands as reports
from onebase.bench.sweep_command import sweep

app = typer.Typer(no_args_is_help=True, help="Benchmarks: ours beside what people use today.")
app.command()(reports.report)
app.command()(reports.compare)
app.command()(load)
app.command()(client)
app.command()(reports.docs)
app.command()(reports.smoke)
app.command()(sweep)
app.command()(peers)
Out = Annotated[Path | None, typer.Option(help="Store the figures as JSON.")]


@app.command()
def mixed(
    requests: Annotated[int, typer.Option(help="Requests a round.", min=1)] = 32,
    clients: Annotated[int, typer.Option(help="Clients, and rows of a static batch.", min=1)] = 16,
    adapters: Annotated[int, typer.Option(help="Distinct adapters, rank 8 to 64, on all linears.", min=1)] = 16,
    tokens_in: Annotated[int, typer.Option(min=1)] = 128,
    tokens_out: Annotated[int, typer.Option(min=2)] = 64,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    shape: Annotated[str, typer.Option(help="tiny or 135m.")] = "135m",
    http: Annotated[bool, typer.Option("--http", help="Ours through the real server, streamed.")] = False,
    out: Out = None,
) -> None:
    """Tokens per second on the CPU: ours, `generate`, and PEFT's mixed batch."""
    import torch

    from onebase.bench.mixed import Plan, run
    from onebase.bench.workload import SHAPES, Load

    kinds = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    if dtype not in kinds:
        raise typer.BadParameter(f"allowed: {', '.join(kinds)}", param_hint="--dtype")
    if shape not in SHAPES:
        raise typer.BadParameter(f"allowed: {', '.join(SHAPES)}", param_hint="--shape")
    load = Load(requests, tokens_in, tokens_out)
    run(Plan(load, clients, adapters, rounds, kinds[dtype], http, shape), out)


@app.command()
def api(
    route: Annotated[str, typer.Option(help="completions or chat.")] = "chat",
    streams: Annotated[int, typer.Option(help="Streams at once.", min=1)] = 64,
    tokens: Annotated[int, typer.Option(help="Of each stream.", min=2)] = 200,
    pause: Annotated[float, typer.Option(help="Milliseconds between two steps.", min=0)] = 10.0,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    out: Out = None,
) -> None:
    """CPU time of the API process for a streamed token."""
    from onebase.bench.api import Case, run
    from onebase.bench.api_clients import BODIES

    if route not in BODIES:
        raise typer.BadParameter(f"allowed: {', '.join(BODIES)}", param_hint="--route")
    run(Case(route, streams, tokens, pause / 1000), rounds, out)


@app.command()
def step(
    shape: Annotated[str, typer.Option(help="135m or 8b.")] = "135m",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    batch: Annotated[list[int] | None, typer.Option(help="Rows a step; may be given several times.")] = None,
    adapters: Annotated[int, typer.Option(help="Distinct adapters in the batch.", min=1)] = 16,
    rank: Annotated[int, typer.Option(help="Their rank; 0: 8 to 64 mixed.", min=0)] = 0,
    steps: Annotated[int, typer.Option(help="Decode steps measured.", min=1)] = 32,
    out: Out = None,
) -> None:
    """Decode steps of the base alone, of the base on an engine that holds adapters, and of a batch of adapters."""
    from onebase.bench.step import run

    run(shape, device, batch or [1, 16, 64], adapters, rank, steps, out)


@app.command()
def speculate(
    shape: Annotated[str, typer.Option(help="135m or 8b.")] = "135m",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    rows: Annotated[int, typer.Option(help="Sequences at once.", min=1)] = 4,
    tokens: Annotated[int, typer.Option(help="Tokens of each.", min=1)] = 64,
    out: Out = None,
) -> None:
    """Drafts by prompt lookup: their gain where text repeats, their cost where it does not."""
    from onebase.bench.speculate import run

    run(shape, device, rows, tokens, out)


@app.command()
def lifecycle(
    scenario: Annotated[
        list[str] | None, typer.Option(help="overcommit, beside-loads, turns, cold; all of them.")
    ] = None,
    shape: Annotated[str, typer.Option(help="tiny, 135m or 8b.")] = "135m",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    registered: Annotated[int, typer.Option(help="Adapters on disk.", min=16)] = 1000,
    room: Annotated[int, typer.Option(help="How many of them fit the device.", min=8)] = 100,
    fit: Annotated[int, typer.Option(help="How many the side without pressure has.", min=8)] = 50,
    rank: Annotated[int, typer.Option(help="Of each, on all linears.", min=1)] = 8,
    requests: Annotated[int, typer.Option(help="Of one side in one round.", min=16)] = 96,
    clients: Annotated[int, typer.Option(help="Of the closed loops.", min=2)] = 16,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    folder: Annotated[
        Path | None, typer.Option(help="Where adapters are made, and left for the next run; else a temporary folder.")
    ] = None,
    out: Out = None,
) -> None:
    """More adapters than the device holds, beside the same load on those that fit; cold starts, beside their floor."""
    from onebase.bench.bed import Plan
    from onebase.bench.lifecycle import SCENARIOS, run
    from onebase.bench.workload import SHAPES

    if unknown := set(scenario or ()) - SCENARIOS.keys():
        raise typer.BadParameter(f"{min(unknown)}: allowed: {', '.join(SCENARIOS)}", param_hint="--scenario")
    if shape not in SHAPES:
        raise typer.BadParameter(f"allowed: {', '.join(SHAPES)}", param_hint="--shape")
    plan = Plan(shape, device, registered, room, fit, rank, requests, clients, rounds)
    run(plan, scenario or (), out, folder)


@app.command()
def fair(
    shape: Annotated[str, typer.Option(help="tiny, 135m or 8b.")] = "135m",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    times: Annotated[float, typer.Option(help="What the flood sends of each other tenant's load.", min=1)] = 20.0,
    rate: Annotated[float, typer.Option(help="Requests a second of each other tenant.")] = 0.3,
    seconds: Annotated[float, typer.Option(help="Of arrivals in a round.", min=1)] = 30.0,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    out: Out = None,
) -> None:
    """First tokens of seven tenants, without and beside an eighth that floods the server."""
    from onebase.bench.fair import Plan, run

    run(Plan(_shape(shape), times=times, rate=rate, seconds=seconds, rounds=rounds), device, out)


@app.command()
def long_prompt(
    shape: Annotated[str, typer.Option(help="tiny, 135m or 8b.")] = "135m",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    streams: Annotated[int, typer.Option(help="That decode.", min=1)] = 15,
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt that arrives among them.", min=1)] = 2000,
    stretch: Annotated[float, typer.Option(help="As --max-step-stretch.", min=1.01)] = 2.2,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    out: Out = None,
) -> None:
    """Times between streams' tokens while a long prompt is computed, with the bound on steps and without."""
    from onebase.bench.long_prompt import Plan, run

    run(Plan(_shape(shape), streams, prompt=prompt, stretch=stretch, rounds=rounds), device, out)


@app.command()
def shared_prefix(
    shape: Annotated[str, typer.Option(help="tiny, 135m or 8b.")] = "135m",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    requests: Annotated[int, typer.Option(help="At once.", min=1)] = 100,
    shared: Annotated[int, typer.Option(help="Tokens that all of them begin with.", min=1)] = 512,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    out: Out = None,
) -> None:
    """Requests that begin alike, with the prefix cache and without it."""
    from onebase.bench.shared_prefix import Plan, run

    run(Plan(_shape(shape), requests, shared, rounds=rounds), device, out)


def _shape(name: str) -> str:
    from onebase.bench.workload import SHAPES

    if name not in SHAPES:
        raise typer.BadParameter(f"allowed: {', '.join(SHAPES)}", param_hint="--shape")
    return name


@app.command()
def kernels(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    hidden: Annotated[list[int] | None, typer.Option(help="Width of the site; may be given several times.")] = None,
    rank: Annotated[list[int] | None, typer.Option(help="Rank; 0: 8 to 128 mixed.")] = None,
    rows: Annotated[list[int] | None, typer.Option(help="Rows of the batch.")] = None,
    distinct: Annotated[list[str] | None, typer.Option(help="Distinct adapters: one, half or all of the rows.")] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    rounds: Annotated[int, typer.Option(help="Rounds in which all sides take turns.", min=1)] = 5,
    out: Out = None,
    csv: Annotated[Path | None, typer.Option(help="Store the table as CSV.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw it; needs the extra `plot`.")] = None,
    decode: Annotated[
        bool, typer.Option(help="A decode step's adapters on the CPU instead, also under churn.")
    ] = False,
    tune: Annotated[Path | None, typer.Option(help="Make this CUDA device's table in the folder instead.")] = None,
) -> None:
    """The low-rank kernels by themselves, beside a loop, gather + bmm, grouped_mm and the base's product."""
    import torch

    from onebase.bench.kernels import SHARES, run

    kinds = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if dtype not in kinds:
        raise typer.BadParameter(f"allowed: {', '.join(kinds)}", param_hint="--dtype")
    if unknown := set(distinct or ()) - set(SHARES):
        raise typer.BadParameter(f"{', '.join(unknown)}: allowed is {', '.join(SHARES)}", param_hint="--distinct")
    if decode:
        from onebase.bench.kernels_decode import run as run_decode

        run_decode(out=out)
        return
    if tune is not None:
        from onebase.bench.kernels_tune import tune as make_table

        make_table(device, tune, dtype=kinds[dtype])
        return
    run(
        device,
        hidden=hidden or (),
        ranks=rank or (),
        rows=rows or (),
        shares=distinct or SHARES,
        dtype=kinds[dtype],
        rounds=rounds,
        out=out,
        table=csv,
        plot=plot,
    )

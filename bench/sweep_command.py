"""`onebase bench sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from onebase.bench.sweep_run import Plan


def sweep(
    url: Annotated[str, typer.Option(help="Any server that speaks the OpenAI protocol: http[s]://HOST[:PORT].")],
    over: Annotated[str, typer.Option(help="rate or adapters.")] = "rate",
    start: Annotated[float, typer.Option(help="The first value.")] = 1.0,
    most: Annotated[float, typer.Option(help="Never beyond.")] = 1024.0,
    step: Annotated[float, typer.Option(help="Neighbours closer than this ratio are not told apart.")] = 1.1,
    target: Annotated[float, typer.Option(help="The attainment that holds, of all offered requests.")] = 0.9,
    slo: Annotated[str, typer.Option(help="Such as ttft=6s,tpot=100ms; also itl, e2e.")] = "ttft=6s",
    seconds: Annotated[float, typer.Option(help="Of arrivals, for each point.")] = 30.0,
    rate: Annotated[float, typer.Option(help="Requests a second, where adapters are swept.")] = 1.0,
    adapters: Annotated[int | None, typer.Option(help="How many, where the rate is swept.  [default: all]")] = None,
    popularity: Annotated[str, typer.Option(help="As of bench load.")] = "uniform",
    arrivals: Annotated[str, typer.Option(help="As of bench load.")] = "poisson",
    tokens_in: Annotated[str, typer.Option(help="As of bench load.")] = "128",
    tokens_out: Annotated[str, typer.Option(help="As of bench load.")] = "64",
    timeout: Annotated[float, typer.Option(help="Seconds for one request: an overloaded point has to end.")] = 60.0,
    processes: Annotated[int, typer.Option(help="Of the client.")] = 1,
    key: Annotated[str, typer.Option(envvar="ONEBASE_API_KEY", help="Bearer key of the requests.")] = "",
    seed: Annotated[int, typer.Option(help="The same seed, the same requests.")] = 42,
    out: Annotated[Path | None, typer.Option(help="Store the points as JSON, a report beside it.")] = None,
) -> None:
    """The highest rate, or number of adapters, at which latencies hold: doubling, bisection, once more to confirm."""
    from onebase.bench.load.options import Options
    from onebase.bench.load.slo import Slo
    from onebase.bench.load.workload import Workload
    from onebase.bench.sweep import Range
    from onebase.bench.sweep_run import Plan

    if over not in ("rate", "adapters"):
        raise typer.BadParameter("allowed: rate, adapters", param_hint="--over")
    try:
        workload = Workload(
            seed, rate, seconds, arrivals=arrivals, popularity=popularity, tokens_in=tokens_in, tokens_out=tokens_out
        )
        options = Options(
            url, workload, adapters=adapters, key=key, slo=Slo.parse(slo), processes=processes, timeout=timeout
        )
        span = Range(start, most, step, whole=over == "adapters")
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    _run(Plan(options, "rate" if over == "rate" else "adapters", span, target), out)


def _run(plan: Plan, out: Path | None) -> None:
    import asyncio

    from onebase.bench.load.processes import WorkerDied
    from onebase.bench.load.server import ServerUnusable
    from onebase.bench.quiet import Quiet
    from onebase.bench.report import store
    from onebase.bench.reports.write import write_report
    from onebase.bench.sweep_run import Sweep

    sweep = Sweep(plan, Quiet())
    try:
        asyncio.run(sweep.run())
    except (ServerUnusable, WorkerDied, ValueError, OSError) as error:
        print(f"Error: {error}")
        raise typer.Exit(1) from None
    finally:
        if sweep.results and out is not None:
            store(out, "sweep", sweep.described())
            write_report(out)
    told = "nothing that was tried" if sweep.highest is None else f"{plan.axis} {sweep.highest:g}"
    print(f"{told} holds {plan.target:.0%}")

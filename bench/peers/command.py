"""`onebase bench peers`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from onebase.bench.peers.drivers import Driver
    from onebase.bench.peers.run import Outcome


def peers(
    server: Annotated[
        list[str] | None, typer.Option(help="ours, peft, vllm, llama.cpp; may be repeated.  [default: ours, peft]")
    ] = None,
    at: Annotated[
        list[str] | None, typer.Option(help="NAME=URL of one that runs already and knows the adapters, as LoRAX.")
    ] = None,
    shape: Annotated[str, typer.Option(help="tiny or 135m.")] = "135m",
    adapters: Annotated[str, typer.Option(help="Such as lora=16,dora=1,ia3=1; also vera, oft.")] = "lora=16",
    rows: Annotated[int, typer.Option(help="Sequences at once, of every server; clients too.", min=1)] = 16,
    requests: Annotated[int, typer.Option(help="Of a round, over each of base and adapters.", min=1)] = 32,
    rate: Annotated[float, typer.Option(help="Open loop with so many a second; 0: a closed one.", min=0)] = 0.0,
    popularity: Annotated[str, typer.Option(help="As of bench load.")] = "uniform",
    tokens_in: Annotated[str, typer.Option(help="As of bench load.")] = "128",
    tokens_out: Annotated[str, typer.Option(help="As of bench load.")] = "64",
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    one_by_one: Annotated[
        bool, typer.Option("--one-by-one", help="Servers one after the other, not in turns.")
    ] = False,
    folder: Annotated[
        Path | None, typer.Option(help="Where model, adapters and logs go; else a temporary one.")
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed, the same requests.")] = 42,
    out: Annotated[Path | None, typer.Option(help="Store the figures as JSON, a report beside it.")] = None,
) -> None:
    """The same requests to this server and to others, over one model and one set of adapters."""
    import tempfile

    from onebase.bench.load.workload import Workload
    from onebase.bench.peers.run import Plan, compete, described
    from onebase.bench.peers.stage import make_stage
    from onebase.bench.quiet import Quiet
    from onebase.bench.report import store
    from onebase.bench.reports.write import write_report
    from onebase.bench.workload import SHAPES

    if shape not in SHAPES or dtype not in ("bfloat16", "float32"):
        raise typer.BadParameter(f"allowed shapes: {', '.join(SHAPES)}; dtypes: bfloat16, float32")
    try:
        chosen, families = _drivers(server or ["ours", "peft"], at or []), _families(adapters)
        shared: dict[str, Any] = {"popularity": popularity, "tokens_in": tokens_in, "tokens_out": tokens_out}
        workload = (
            Workload(seed, rate, requests / rate, **shared)
            if rate
            else Workload(seed, seconds=None, clients=rows, requests=requests, **shared)
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    plan = Plan(workload, rounds, not one_by_one)
    with tempfile.TemporaryDirectory(prefix="onebase-peers-") as temporary:
        stage = make_stage(folder or Path(temporary), shape, families, rows, dtype)
        outcome = compete(chosen, stage, plan, Quiet())
        data = described(outcome, plan, stage) | {"shape": shape}
    _show(outcome, data)
    if out is not None:
        store(out, "peers", data)
        write_report(out)


def _drivers(names: list[str], addresses: list[str]) -> list[Driver]:
    """Raises ValueError."""
    from onebase.bench.peers.drivers import DRIVERS, Running

    if unknown := set(names) - DRIVERS.keys():
        raise ValueError(f"server: {min(unknown)!r}; allowed: {', '.join(DRIVERS)}")
    pairs = [address.partition("=") for address in addresses]
    if not all(name and url for name, _, url in pairs):
        raise ValueError("at: NAME=URL")
    return [*(DRIVERS[name] for name in names), *(Running(name, url) for name, _, url in pairs)]


def _families(text: str) -> dict[str, int]:
    """``lora=16,ia3=1``. Raises ValueError."""
    from onebase.bench.peers.stage import FAMILIES

    found: dict[str, int] = {}
    for part in filter(None, text.split(",")):
        name, _, count = part.partition("=")
        if name not in FAMILIES or not count.isdecimal() or name in found:
            raise ValueError(f"adapters: {part!r}; allowed is FAMILY=COUNT, once each of {', '.join(FAMILIES)}")
        found[name] = int(count)
    return found


def _show(outcome: Outcome, data: dict[str, Any]) -> None:
    from onebase.bench.report import Spread, print_table

    for side, metrics in data["figures"].items():
        names = list(dict.fromkeys(name for servers in metrics.values() for name in servers))
        rows = [
            [metric, *(str(Spread(tuple(servers[n]))) if n in servers else "-" for n in names)]
            for metric, servers in metrics.items()
        ]
        if rows:
            print_table(f"over {side}", ["", *names], rows)
    for name, why in outcome.absent.items():
        print(f"{name} did not take part: {why}")
    for peer in outcome.peers:
        for adapter, reason in peer.refused.items():
            print(f"{peer.name} refused {adapter}: {reason}")

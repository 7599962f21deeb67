"""Writes docs/benchmarks.md from what is stored under bench/results/."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from onebase.bench.load import result as load
from onebase.bench.reports.claims import Checked, check
from onebase.bench.reports.figures import figures
from onebase.bench.reports.load_page import seconds
from onebase.bench.reports.markdown import table
from onebase.bench.reports.scale import number
from onebase.bench.reports.stored import Stored, parts, read

_HEAD = """# Benchmarks

Made by `onebase bench docs` from the files in [bench/results](../bench/results); a test holds both together. Do not
edit: measure, store with `--out bench/results/NAME.json`, and run it again.

Times are taken as the literature does. TTFT: first token - sent. TPOT: (E2E - TTFT) / (tokens out - 1). ITL: each gap
between two pieces of text. E2E: last token - sent. Goodput: requests a second that meet every limit. Attainment: their
share of all requests offered, those rejected included. Weights are random, of the shape named; nothing is downloaded.
"""
_AGAIN: Mapping[str, str] = {
    "mixed": "onebase bench mixed --http",
    "step": "onebase bench step",
    "prefill": "bench/gpu.sh prefill",
    "lifecycle": "onebase bench lifecycle --rank 4 --requests 48 --rounds 2",
    "kernels": "onebase bench kernels",
    "kernels-decode": "onebase bench kernels --decode",
    "fair": "onebase bench fair",
    "long-prompt": "onebase bench long-prompt",
    "shared-prefix": "onebase bench shared-prefix",
    "speculate": "onebase bench speculate",
    "api": "onebase bench api",
    "load": "onebase bench load --url URL",
    "sweep": "onebase bench sweep --url URL",
    "peers": "onebase bench peers",
    "smoke": "make bench-smoke",
}


def document(folder: Path) -> str:
    """folder: of stored results. Raises stored.NotStored."""
    results = [read(path) for path in sorted(folder.glob("*.json"))]
    checked = list(check(results))
    return "\n".join([_HEAD, *_standing(checked), *(_section(stored) for stored in results)])


def _standing(checked: Sequence[Checked]) -> Iterator[str]:
    yield "## Where we are behind\n"
    behind = [row for row in checked if not row.holds]
    yield _rows(behind) if behind else "Nowhere, of what is stored here.\n"
    yield "## Where we are not\n"
    ahead = [row for row in checked if row.holds]
    yield _rows(ahead) if ahead else "Nothing is stored.\n"


def _rows(checked: Sequence[Checked]) -> str:
    rows = [
        [
            row.claim.what,
            number(row.value),
            f"{row.claim.sense} {number(row.claim.bound)}",
            row.claim.why,
            _link(row.stored),
        ]
        for row in checked
    ]
    return table(["", "measured", "should be", "held against", "file"], rows)


def _link(stored: Stored) -> str:
    return f"[{stored.name}](../bench/results/{stored.name}.json)"


def _section(stored: Stored) -> str:
    again = _AGAIN.get(stored.benchmark, f"onebase bench {stored.benchmark}")
    head = f"## {stored.benchmark}: {stored.name}\n\nOn {stored.where}. Again: `{again}`. File: {_link(stored)}.\n"
    return f"{head}\n{_figures(stored)}"


def _figures(stored: Stored) -> str:
    if stored.benchmark == load.NAME:
        return _load(stored)
    if "parts" in stored.data:
        return "\n".join(f"### {name}\n\n{_figures(part)}" for name, part in parts(stored).items())
    text = table(["figure", "median (lowest to highest)"], [[f.name, str(f)] for f in figures(stored)])
    refused = stored.data.get("refused")
    return text + (_refusals(refused) if isinstance(refused, Mapping) else "")


def _refusals(refused: Mapping[str, Mapping[str, str]]) -> str:
    rows = [[server, adapter, why[:200]] for server, one in refused.items() for adapter, why in one.items()]
    return "\n" + table(["refused by", "adapter", "why"], rows) if rows else "\nNo server refused an adapter.\n"


def _load(stored: Stored) -> str:
    run = stored.load()
    one = run.summary
    rows = [
        ["adapters, requests offered", f"{len(one.per_adapter)}, {one.offered}"],
        ["answered, rejected, failed, cancelled", f"{one.ok}, {one.rejected}, {one.failed}, {one.cancelled}"],
        ["tokens/s, requests/s", f"{number(one.tokens_per_second)}, {number(one.requests_per_second)}"],
        ["goodput, attainment", f"{number(one.goodput)}, {one.attainment:.1%}"],
    ]
    for name, stats in (("TTFT", one.ttft), ("TPOT", one.tpot), ("ITL", one.itl), ("E2E", one.e2e)):
        if stats is not None:
            rows.append([f"{name} p50, p90, p99", ", ".join(seconds(v) for v in (stats.p50, stats.p90, stats.p99))])
    warnings = "".join(f"\nNot to be trusted: {text}.\n" for text in run.client.warnings)
    return table(["figure", "value"], rows) + warnings

"""What the figures are held against: the other side of the same run, targets that were set, and published figures.

A figure is found by the benchmark and the name that figures.py gives it. Published figures come from other machines, or
from the same kind of machine at another time; they say where we stand, no more.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from onebase.bench.reports.figures import Figure, figures
from onebase.bench.reports.stored import Stored


@dataclass(frozen=True, slots=True)
class Claim:
    """figure: its name, as in the pages of results. sense: whether it should be at least or at most ``bound``."""

    benchmark: str
    figure: str
    what: str
    sense: Literal["at least", "at most"]
    bound: float
    why: str

    def holds(self, value: float) -> bool:
        return value >= self.bound if self.sense == "at least" else value <= self.bound


@dataclass(frozen=True, slots=True)
class Checked:
    """A claim beside what was measured, in the file ``stored``."""

    claim: Claim
    stored: Stored
    value: float

    @property
    def holds(self) -> bool:
        return self.claim.holds(self.value)


_SAME_RUN, _SET = "the other side of the same run", "set as a target"
_FLOOR = "a decode step / its weights at copy speed"
_VLLM = "vLLM 0.32's CPU build, same shape and load, on another day"
CLAIMS = (
    Claim("mixed", "ratios: base: ours / generate", "base, tokens/s: ours / `generate`", "at least", 1.5, _SET),
    Claim("mixed", "ratios: adapters: ours / PEFT", "16 adapters, tokens/s: ours / PEFT", "at least", 3.5, _SET),
    Claim("mixed", "ratios: ours: adapters / base, in tokens/s", "16 adapters / base, tokens/s", "at least", 0.6, _SET),
    Claim("mixed", "tokens_per_second: ours, base", "base, tokens/s", "at least", 155, _VLLM),
    Claim("mixed", "tokens_per_second: ours, adapters", "16 adapters, tokens/s", "at least", 7.6, _VLLM),
    Claim(
        "lifecycle",
        "overcommit: alpha 0.3: ratios: throughput, many / few",
        "1,000 adapters on room for 100 / 50 that fit, alpha 0.3: throughput",
        "at least",
        0.85,
        _SET,
    ),
    Claim(
        "lifecycle",
        "overcommit: alpha 0.3: ratios: median TTFT, many / few",
        "the same, median TTFT",
        "at most",
        1.0,
        _SAME_RUN,
    ),
    Claim(
        "lifecycle",
        "overcommit: alpha 1: ratios: median TTFT, many / few",
        "the same at alpha 1, median TTFT",
        "at most",
        1.0,
        _SAME_RUN,
    ),
    Claim(
        "lifecycle",
        "beside-loads: ratios: p99 gap, beside cold / beside resident",
        "p99 between tokens beside cold loads / beside warm requests",
        "at most",
        1.1,
        _SET,
    ),
    Claim(
        "lifecycle",
        "turns: ratios: median TTFT, 16 / 8",
        "16 adapters on room for 8 / 8: median TTFT",
        "at most",
        2,
        _SET,
    ),
    Claim(
        "lifecycle",
        "cold: ratios: cold / floor",
        "cold adapter's first token / bytes read and a warm one",
        "at most",
        1.5,
        _SET,
    ),
    Claim(
        "step",
        "rows 16: base with adapters loaded / none, in time",
        "a base's step with adapters loaded / without",
        "at most",
        1.02,
        _SET,
    ),
    Claim("step", "rows 16: adapters / base, in time", "16 adapters' step / a base's step", "at most", 1.67, _SET),
    *(
        Claim("step", f"side graphs, rows {rows}: base / floor", f"8B, {rows} rows: {_FLOOR}", "at most", most, _SET)
        for rows, most in ((1, 1.35), (64, 1.5))
    ),
    *(
        Claim(
            "kernels",
            f"hidden 4096, rank {rank}, rows 64, programs 64, floor_bytes {floor}: share_of_copy_bandwidth",
            f"64 rows of as many adapters of rank {rank}, width 4,096: share of copy bandwidth",
            "at least",
            least,
            _SET,
        )
        for rank, floor, least in ((16, 18_354_176, 0.4), (64, 68_698_112, 0.6))
    ),
    Claim("prefill", "share of the GEMM rate", "prefill of 8 x 1,024: share of the GEMM rate", "at least", 0.55, _SET),
    Claim("fair", "ratio", "others' p90 TTFT beside a flood / without", "at most", 1.5, _SET),
    Claim("shared-prefix", "ratio", "100 requests that share 512 tokens: cache / none", "at least", 20, _SET),
    Claim("shared-prefix", "across", "cached tokens across adapters", "at most", 0, _SET),
    Claim(
        "long-prompt",
        "sides: stretch 2.2: p99_over_median",
        "p99 / median between tokens beside 2,000",
        "at most",
        2.5,
        _SET,
    ),
)


def check(results: Iterable[Stored]) -> Iterator[Checked]:
    """Every claim on every result that has its figure, and each server of `peers` beside ours."""
    for stored in results:
        found = {figure.name: figure for figure in figures(stored)}
        for claim in CLAIMS:
            if claim.benchmark == stored.benchmark and claim.figure in found:
                yield Checked(claim, stored, found[claim.figure].median)
        if stored.benchmark == "peers":
            yield from _beside_peers(stored, found.values())


def _beside_peers(stored: Stored, found: Iterable[Figure]) -> Iterator[Checked]:
    """Ours over each other server's, metric by metric: at least 1 where more is better, at most 1 where less is."""
    values = {figure.path: figure for figure in found}
    for path, other in values.items():
        ours = values.get((*path[:-1], "ours"))
        if path[-1] == "ours" or ours is None or other.better is None or not other.median:
            continue
        what = f"{': '.join(path[:-1])}: ours / {path[-1]}"
        sense: Literal["at least", "at most"] = "at least" if other.better == "higher" else "at most"
        yield Checked(Claim("peers", other.name, what, sense, 1.0, _SAME_RUN), stored, ours.median / other.median)

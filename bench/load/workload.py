"""All requests of a run, drawn before it starts. Its parameters and its seed give the same ones again.

Adapters, lengths and times are drawn from one generator in the order of S-LoRA's benchmark (2311.03285), so that with
``power``, ``gamma`` and uniform lengths a seed gives the requests which that benchmark would send.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator, RandomState, default_rng

from onebase.bench.load.arrivals import Arrivals, parse_arrivals
from onebase.bench.load.lengths import parse_lengths
from onebase.bench.load.popularity import parse_popularity
from onebase.bench.load.traces import MOONCAKE_BLOCK, TraceRequest


@dataclass(frozen=True, slots=True)
class Piece:
    """The part of a prompt that others begin with, too. Equal seeds, equal tokens."""

    seed: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Planned:
    """A request to send. at: seconds after the start; none: when a client is free. model: what it names. tenant: index.

    prefix: what its prompt begins with; the rest is its own, drawn from ``seed``. cancel_after: pieces of text after
    which the client breaks off; none: it stays to the end.
    """

    number: int
    at: float | None
    model: str
    tenant: int
    tokens_in: int
    tokens_out: int
    prefix: tuple[Piece, ...]
    seed: int
    cancel_after: int | None


@dataclass(frozen=True, slots=True)
class Workload:
    """The parameters. Open loop: rate (requests a second) and seconds. Closed loop: clients and requests; seconds,
    where given, is when clients stop sending. The texts are as on the command line.

    shared_prefix: tokens that the prompts of one of ``prefix_groups`` groups begin with. cancel: share of the requests
    that the client breaks off. speed: of a trace's clock.
    """

    seed: int = 42
    rate: float = 1.0
    seconds: float | None = 60.0
    clients: int = 0
    requests: int = 0
    arrivals: str = "poisson"
    popularity: str = "uniform"
    tokens_in: str = "128"
    tokens_out: str = "64"
    shared_prefix: int = 0
    prefix_groups: int = 1
    cancel: float = 0.0
    speed: float = 1.0

    def __post_init__(self) -> None:
        parse_arrivals(self.arrivals)
        parse_popularity(self.popularity)
        parse_lengths("tokens_in", self.tokens_in)
        parse_lengths("tokens_out", self.tokens_out)
        if not 0 <= self.cancel <= 1:
            raise ValueError("cancel: a share from 0 to 1")
        if min(self.rate, self.speed) <= 0 or (self.seconds is not None and self.seconds <= 0):
            raise ValueError("rate, speed, seconds: above 0")
        if min(self.shared_prefix, self.prefix_groups - 1, self.clients, self.requests, self.seed) < 0:
            raise ValueError("shared_prefix, clients, requests, seed: at least 0; prefix_groups: at least 1")
        if bool(self.clients) != bool(self.requests):
            raise ValueError("clients and requests: both make a closed loop, neither an open one")

    @property
    def closed(self) -> bool:
        return self.clients > 0

    def plan(
        self, models: Sequence[str], shares: Sequence[float] = (1.0,), trace: Sequence[TraceRequest] = ()
    ) -> list[Planned]:
        """models: the names to draw from. shares: of the requests, by tenant. trace: in place of drawn times and
        lengths; adapters too, where it names them.

        Raises ValueError where a trace's adapters are more than there are models, or nothing is planned.
        """
        drawn = list(self._of_trace(models, trace) if trace else self._draw(models))
        if not drawn:
            raise ValueError("rate, seconds: no request comes of them")
        extra = default_rng([self.seed, 1])
        tenants = extra.choice(len(shares), len(drawn), p=np.array(shares) / sum(shares))
        groups = extra.integers(0, self.prefix_groups, len(drawn))
        cancels = self._cancels(extra, [one.tokens_out for one in drawn])
        return [
            Planned(
                number=number,
                at=None if self.closed else one.at,
                model=one.model,
                tenant=int(tenants[number]),
                tokens_in=one.tokens_in,
                tokens_out=one.tokens_out,
                prefix=one.prefix or self._shared(int(groups[number]), one.tokens_in),
                seed=number,
                cancel_after=cancels[number],
            )
            for number, one in enumerate(drawn)
        ]

    def _draw(self, models: Sequence[str]) -> Iterator[_Drawn]:
        random = RandomState(self.seed)
        count = self.requests or self._arrivals.count(self.rate, self._span)
        adapters = parse_popularity(self.popularity).draw(random, len(models), count)
        tokens_in = parse_lengths("tokens_in", self.tokens_in).draw(random, count)
        tokens_out = parse_lengths("tokens_out", self.tokens_out).draw(random, count)
        times = np.zeros(count) if self.closed else self._arrivals.times(random, self.rate, self._span)
        for at, adapter, asked, wanted in zip(times, adapters, tokens_in, tokens_out, strict=True):
            yield _Drawn(float(at), models[adapter], int(asked), int(wanted), ())

    @property
    def _arrivals(self) -> Arrivals:
        return parse_arrivals(self.arrivals)

    @property
    def _span(self) -> float:
        if self.seconds is None:
            raise ValueError("seconds: needed in an open loop without a trace")
        return self.seconds

    def _of_trace(self, models: Sequence[str], trace: Sequence[TraceRequest]) -> Iterator[_Drawn]:
        last = None if self.seconds is None else self.seconds * self.speed
        kept = [one for one in trace if last is None or one.at < last][: self.requests or None]
        adapters = parse_popularity(self.popularity).draw(RandomState(self.seed), len(models), len(kept))
        named = _names(models, kept)
        for one, drawn in zip(kept, adapters, strict=True):
            model = models[drawn] if one.adapter is None else named[one.adapter]
            yield _Drawn(one.at / self.speed, model, one.tokens_in, one.tokens_out, _blocks(one))

    def _shared(self, group: int, tokens_in: int) -> tuple[Piece, ...]:
        """A prompt always has a last token of its own."""
        tokens = min(self.shared_prefix, tokens_in - 1)
        return (Piece(group, tokens),) if tokens else ()

    def _cancels(self, random: Generator, tokens_out: Sequence[int]) -> list[int | None]:
        """After how many pieces, from the first to the last but one."""
        chosen = random.random(len(tokens_out)) < self.cancel
        places = random.random(len(tokens_out))
        return [
            1 + int(place * max(1, tokens - 1)) if chose else None
            for chose, place, tokens in zip(chosen, places, tokens_out, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class _Drawn:
    at: float
    model: str
    tokens_in: int
    tokens_out: int
    prefix: tuple[Piece, ...]


def _names(models: Sequence[str], trace: Sequence[TraceRequest]) -> dict[str, str]:
    """A trace's adapter -> the model that stands for it: the one of that name, else one after the other."""
    wanted = list(dict.fromkeys(one.adapter for one in trace if one.adapter is not None))
    free = iter([model for model in models if model not in set(wanted)])
    named = {name: name if name in models else next(free, None) for name in wanted}
    if missing := [name for name, model in named.items() if model is None]:
        raise ValueError(f"trace: {len(wanted)} adapters, such as {missing[0]!r}; the server has {len(models)} to use")
    return {name: model for name, model in named.items() if model is not None}


def _blocks(one: TraceRequest) -> tuple[Piece, ...]:
    """The hashes of a Mooncake prompt; the last one may stand for fewer tokens than a block has."""
    left = one.tokens_in - 1
    pieces = []
    for block in one.blocks:
        if left <= 0:
            break
        pieces.append(Piece(block, min(MOONCAKE_BLOCK, left)))
        left -= MOONCAKE_BLOCK
    return tuple(pieces)

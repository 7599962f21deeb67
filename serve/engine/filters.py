"""top_k, top_p and min_p: which of a row's tokens may be drawn.

All three keep a prefix of the tokens in order of probability, equal ones by their ids. Sorting a whole vocabulary takes
far longer than all the rest, and on a CPU nearly every prefix is short: so there the likeliest CANDIDATES are taken
first, then more of them, and only rows that keep still more are sorted. A row's draw is the same either way, to the
bit: sums run along it from its likeliest token on, and what a row takes depends on the row alone.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from onebase.serve.engine.messages import SamplingParams
from onebase.serve.engine.upload import upload

CANDIDATES = (1024, 16_384)


@dataclass(frozen=True, slots=True)
class Filters:
    """One column [rows, 1] for each filter. top_k: the vocabulary's size where it is off; capped: where it is on."""

    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    capped: Tensor

    @classmethod
    def of(cls, params: Rows[SamplingParams], vocab_size: int, device: torch.device) -> Filters:
        def column(values: list[float]) -> Tensor:
            return upload(np.array(values, dtype=np.float32), device)[:, None]

        top_k = column([p.top_k or vocab_size for p in params])
        return cls(top_k, column([p.top_p for p in params]), column([p.min_p for p in params]), top_k < vocab_size)

    def rows(self, chosen: Tensor) -> Filters:
        return Filters(self.top_k[chosen], self.top_p[chosen], self.min_p[chosen], self.capped[chosen])


def kept(probs: Tensor, params: Rows[SamplingParams]) -> tuple[Tensor, Tensor]:
    """probs: [rows, vocabulary]. (weights, tokens), both [rows, n]: likeliest first, zero for what may not be drawn."""
    filters = Filters.of(params, probs.shape[1], probs.device)
    sizes = () if probs.device.type == "cuda" else tuple(size for size in CANDIDATES if size < probs.shape[1])
    return _kept(probs, filters, sizes)


def _kept(probs: Tensor, filters: Filters, sizes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """sizes: how many candidates are tried, ascending."""
    if not sizes:
        return _sorted(probs, filters)
    weights, tokens, certain = _candidates(probs, filters, sizes[0])
    if bool(certain.all()):
        return weights, tokens
    rest = (~certain).nonzero()[:, 0]
    more, their_tokens = _kept(probs[rest], filters.rows(rest), sizes[1:])
    width = more.shape[1]
    whole = functional.pad(weights, (0, width - sizes[0])), functional.pad(tokens, (0, width - sizes[0]))
    whole[0][rest], whole[1][rest] = more, their_tokens
    return whole


def _sorted(probs: Tensor, filters: Filters) -> tuple[Tensor, Tensor]:
    ordered, tokens = probs.sort(dim=-1, descending=True, stable=True)
    return _filtered(ordered, filters), tokens


def _candidates(probs: Tensor, filters: Filters, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same of the likeliest tokens, and bool [rows]: whether nothing else is kept. Of equal tokens at the border
    some may be missing, so the last one kept has to be likelier than the last candidate."""
    found, tokens = probs.topk(count, dim=-1, sorted=False)
    by_id = tokens.argsort(dim=-1)
    ordered, order = found.gather(1, by_id).sort(dim=-1, descending=True, stable=True)
    weights = _filtered(ordered, filters)
    last = (weights > 0).sum(dim=-1, keepdim=True).clamp(min=1) - 1
    certain = ordered.gather(1, last) > ordered[:, -1:]
    return weights, tokens.gather(1, by_id).gather(1, order), certain[:, 0]


def _filtered(ordered: Tensor, filters: Filters) -> Tensor:
    """Probabilities in descending order, with zeros for what is not kept. top_p counts the mass of what top_k keeps;
    the token that crosses it is kept, and the likeliest always."""
    rank = torch.arange(ordered.shape[1], device=ordered.device)
    weights = ordered.masked_fill(rank >= filters.top_k, 0.0)
    sums = weights.cumsum(dim=-1)
    mass = torch.where(filters.capped, sums[:, -1:], 1.0)
    before = sums - weights
    weights = weights.masked_fill((before >= filters.top_p * mass) & (rank > 0) & (filters.top_p < 1.0), 0.0)
    return weights.masked_fill(weights < filters.min_p * ordered[:, :1], 0.0)

"""Sampling against independent computations, and its independence of batch mates."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from onebase.serve.engine import filters, sampler
from onebase.serve.engine.greedy import NOT_FINITE
from onebase.serve.engine.messages import SamplingParams
from onebase.serve.engine.sampler import sample, uniform

VOCAB = 50


def _allowed(logits: torch.Tensor, *, temperature: float, top_k: int, top_p: float, min_p: float) -> set[int]:
    """Tokens that may be drawn, by the plain definition of the filters, one after the other."""
    probs = torch.softmax(logits.double() / temperature, -1).tolist()
    ranked = sorted(range(len(probs)), key=lambda token: -probs[token])
    ranked = ranked[: top_k or len(ranked)]
    total = sum(probs[token] for token in ranked)
    kept, mass = [], 0.0
    for token in ranked:
        if kept and mass >= top_p:
            break
        kept.append(token)
        mass += probs[token] / total
    return {token for token in kept if probs[token] >= min_p * probs[ranked[0]]}


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 5},
        {"temperature": 1.3, "top_p": 0.6},
        {"temperature": 1.0, "min_p": 0.3},
        {"temperature": 0.9, "top_k": 12, "top_p": 0.8, "min_p": 0.05},
        {"temperature": 1.0, "top_p": 1e-9},
        {"temperature": 1.0, "top_k": 1},
    ],
)
def test_draws_follow_the_filtered_distribution(options: dict[str, Any]) -> None:
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(1)) * 2
    settings = {"top_k": 0, "top_p": 1.0, "min_p": 0.0} | options
    allowed = _allowed(logits, **settings)
    draws = 4000
    params = [SamplingParams(seed=seed, **options) for seed in range(draws)]
    drawn = sample(logits.expand(draws, -1), params, [3] * draws)
    counts = torch.bincount(drawn, minlength=VOCAB).double() / draws
    assert set(drawn.tolist()) <= allowed
    probs = torch.softmax(logits.double() / settings["temperature"], -1)
    probs = torch.where(torch.tensor([token in allowed for token in range(VOCAB)]), probs, 0.0)
    assert float((counts - probs / probs.sum()).abs().sum()) < 0.12


def test_a_row_draws_the_same_whatever_its_batch_mates() -> None:
    logits = torch.randn(9, VOCAB, generator=torch.Generator().manual_seed(2))
    params = [SamplingParams(temperature=1.0, top_p=0.9 if i % 2 else 1.0, top_k=i, seed=i) for i in range(9)]
    together = sample(logits, params, list(range(9))).tolist()
    alone = [sample(logits[i : i + 1], [params[i]], [i]).item() for i in range(9)]
    assert together == alone


def test_greedy_rows_stay_greedy_beside_sampled_ones() -> None:
    logits = torch.randn(2, VOCAB)
    drawn = sample(logits, [SamplingParams(temperature=0.0), SamplingParams(temperature=1.0)], [0, 0])
    assert drawn[0] == logits[0].argmax()


def test_uniform_depends_on_seed_and_position() -> None:
    numbers = [uniform(seed, position) for seed in (-(2**63), 0, 1, 2**63) for position in (0, 1, 2)]
    assert len(set(numbers)) == 12
    assert all(0 <= number < 1 for number in numbers)
    assert abs(sum(uniform(7, i) for i in range(4000)) / 4000 - 0.5) < 0.02


def test_rows_that_are_not_finite_are_marked_and_harm_nobody() -> None:
    logits = torch.randn(4, VOCAB)
    logits[1, 7] = float("nan")
    logits[2, 9] = float("inf")
    logits[3, :5] = float("-inf")
    params = [SamplingParams(temperature=t) for t in (0.0, 0.0, 1.0, 1.0)]
    tokens = sample(logits, params, [0] * 4).tolist()
    assert tokens[0] == logits[0].argmax()
    assert tokens[1:3] == [NOT_FINITE] * 2
    assert tokens[3] >= 5


def test_large_batches_are_drawn_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(9, VOCAB, generator=torch.Generator().manual_seed(4))
    params = [SamplingParams(temperature=1.0, top_p=0.5 if i % 3 else 1.0, seed=i) for i in range(9)]
    whole = sample(logits, params, list(range(9)))
    monkeypatch.setattr(sampler, "_BLOCK", 2 * VOCAB)
    assert torch.equal(sample(logits, params, list(range(9))), whole)


FILTERED: list[dict[str, Any]] = [
    {"top_k": 3},
    {"top_k": 40, "top_p": 0.9},
    {"top_k": 900},
    {"top_p": 0.5},
    {"top_p": 0.999},
    {"min_p": 0.2},
    {"min_p": 1e-6},
    {"top_k": 5, "top_p": 0.7, "min_p": 0.1},
]


@pytest.mark.parametrize("spread", [0.0, 0.3, 4.0])
@pytest.mark.parametrize("coarse", [False, True])
def test_candidates_give_what_sorting_everything_gives(
    monkeypatch: pytest.MonkeyPatch, spread: float, coarse: bool
) -> None:
    """coarse: logits with many ties; spread 0: all tokens are equal."""
    logits = torch.randn(8 * len(FILTERED), 3000, generator=torch.Generator().manual_seed(5)) * spread
    logits = logits.round() if coarse else logits
    params = [SamplingParams(seed=row, **FILTERED[row % len(FILTERED)]) for row in range(len(logits))]
    positions = list(range(len(logits)))
    fast = sample(logits, params, positions)
    alone = [int(sample(logits[row : row + 1], [params[row]], [row])) for row in range(0, len(logits), 7)]
    assert fast[::7].tolist() == alone
    monkeypatch.setattr(filters, "CANDIDATES", (64, 512))
    assert torch.equal(sample(logits, params, positions), fast)
    monkeypatch.setattr(filters, "CANDIDATES", ())
    assert torch.equal(sample(logits, params, positions), fast)


def test_short_prefixes_need_no_sort(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filters, "_sorted", None)
    logits = torch.randn(4, 3000, generator=torch.Generator().manual_seed(6)) * 4
    params = [SamplingParams(seed=row, top_p=0.9) for row in range(4)]
    assert sample(logits, params, [0] * 4).shape == (4,)

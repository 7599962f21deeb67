"""What requests ask of the logits, each against a plain computation of its own in float64; and what a draw tells."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers

from onebase.serve.engine.adjust import adjusted
from onebase.serve.engine.draw import _drawn, begin, begin_apart, draw
from onebase.serve.engine.greedy import NOT_FINITE
from onebase.serve.engine.logprobs import unpack
from onebase.serve.engine.messages import Request, SamplingParams
from onebase.serve.engine.sequence import Sequence

VOCAB = 40
PROMPT = (3, 3, 5, 17)
ANSWER = (8, 5, 8, 8, 30)


def _sequence(answer: tuple[int, ...] = ANSWER, eos: tuple[int, ...] = (2,), **sampling: Any) -> Sequence:
    sequence = Sequence.of(Request("r", PROMPT, SamplingParams(**sampling)), 0, frozenset(eos))
    sequence.tokens += answer
    return sequence


def _logits(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def _plain(logits: np.ndarray, sequence: Sequence) -> np.ndarray:
    """The definitions, one token of the vocabulary after the other."""
    sampling, answer = sequence.request.sampling, sequence.tokens[len(PROMPT) :]
    found = logits.astype(np.float64)
    for token in range(VOCAB):
        found[token] += dict(sampling.logit_bias).get(token, 0.0)
        if token in PROMPT or token in answer:
            found[token] *= (1 / sampling.repetition_penalty) if found[token] > 0 else sampling.repetition_penalty
        found[token] -= answer.count(token) * sampling.frequency_penalty
        found[token] -= (token in answer) * sampling.presence_penalty
        ends = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else sequence.eos)}
        if len(answer) < sampling.min_tokens and token in ends:
            found[token] = -np.inf
    return found


ASKED: list[dict[str, Any]] = [
    {},
    {"logit_bias": ((3, 7.5), (8, -100.0), (39, 100.0))},
    {"presence_penalty": 1.5},
    {"presence_penalty": -2.0},
    {"frequency_penalty": 0.75},
    {"repetition_penalty": 1.8},
    {"repetition_penalty": 0.5},
    {"min_tokens": 6},
    {"min_tokens": 6, "stop_token_ids": (8, 9)},
    {"min_tokens": 6, "stop_token_ids": (8, 9), "ignore_eos": True},
    {"min_tokens": 5, "stop_token_ids": (8, 9)},
    {
        "logit_bias": ((5, -1.0),),
        "presence_penalty": 0.3,
        "frequency_penalty": -0.4,
        "repetition_penalty": 1.2,
        "min_tokens": 9,
    },
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_adjusted_by_the_definitions_in_one_batch(dtype: torch.dtype) -> None:
    sequences = [_sequence(**asked) for asked in ASKED]
    logits = _logits(len(ASKED)).to(dtype)
    before = logits.clone()
    found = adjusted(logits, sequences)
    assert torch.equal(logits, before), "log-probabilities are told of what the model said"
    for row, sequence in enumerate(sequences):
        wanted = torch.from_numpy(_plain(logits[row].double().numpy(), sequence))
        torch.testing.assert_close(found[row].double(), wanted, atol=1e-5, rtol=1e-6)


def test_repetition_penalty_is_that_of_transformers() -> None:
    logits, sequence = _logits(1), _sequence(repetition_penalty=1.7)
    theirs = transformers.RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([sequence.tokens]), logits.clone())
    torch.testing.assert_close(adjusted(logits, [sequence]), theirs)


def test_logits_that_nobody_touches_are_not_copied() -> None:
    logits = _logits(2)
    assert adjusted(logits, [_sequence(), _sequence(temperature=0.0)]) is logits


def test_counts_follow_the_tokens_and_survive_preemption() -> None:
    grown, rows = _sequence((), presence_penalty=1.0, frequency_penalty=0.5, repetition_penalty=1.3), _logits(8)
    for step, token in enumerate((8, 8, 5, 8, 39, 0, 1)):
        at_once = _sequence(tuple(grown.tokens[len(PROMPT) :]), **_asked(grown))
        torch.testing.assert_close(adjusted(rows[step : step + 1], [grown]), adjusted(rows[step : step + 1], [at_once]))
        if step == 4:
            grown.restart()
            assert grown.counts is None
        grown.tokens.append(token)


def _asked(sequence: Sequence) -> dict[str, Any]:
    sampling = sequence.request.sampling
    return {name: getattr(sampling, name) for name in ("presence_penalty", "frequency_penalty", "repetition_penalty")}


def test_virtual_tokens_of_an_adapter_are_in_no_count() -> None:
    plain, soft = (_sequence(repetition_penalty=2.0, frequency_penalty=1.0) for _ in range(2))
    assert soft.layout is not None
    soft.lay_out(type(soft.layout)(num_virtual=3))
    assert soft.tokens[:3] == [-1, -2, -3]
    logits = _logits(1)
    assert torch.equal(adjusted(logits, [plain]), adjusted(logits, [soft]))


def test_logprobs_are_of_the_logits_that_the_model_gave() -> None:
    logits = _logits(1)
    sequence = _sequence(logit_bias=((4, 100.0),), logprobs=2, temperature=0.0)
    ((token, told),) = draw(logits, [sequence])
    assert token == 4
    assert told is not None
    (one,) = unpack(told)
    expected = torch.log_softmax(logits[0].double(), -1)
    assert one.logprob == pytest.approx(float(expected[4]), abs=1e-5)
    assert [best for best, _ in one.top] == expected.argsort(descending=True)[:2].tolist()


def test_only_those_who_asked_are_told_each_in_its_width() -> None:
    sequences = [_sequence(), _sequence(logprobs=0), _sequence(logprobs=2), _sequence(logprobs=VOCAB + 5)]
    told = [logprobs for _, logprobs in draw(_logits(4), sequences)]
    assert [one and one.width for one in told] == [None, 0, 2, VOCAB]
    alone = [draw(_logits(4)[row : row + 1], [sequence])[0][1] for row, sequence in enumerate(sequences)]
    assert told == alone


def test_a_row_that_is_not_finite_harms_nobody_and_its_token_stays_in_the_vocabulary() -> None:
    logits = _logits(3)
    logits[1, 7] = float("nan")
    pending = begin(logits, [_sequence(logprobs=1, min_tokens=9) for _ in range(3)])
    assert pending.tokens[1] == 0, "the next forward may read it"
    (_, first), (token, second), (_, third) = pending.result()
    assert token == NOT_FINITE
    assert second is None
    assert first is not None
    assert third is not None


def test_rows_drawn_apart_are_those_drawn_together() -> None:
    asked: list[dict[str, Any]] = [{**one, "seed": at, "logprobs": at % 3} for at, one in enumerate(ASKED)]
    logits = _logits(len(asked))
    together, apart = (f(logits, [_sequence(**one) for one in asked]) for f in (begin, begin_apart))
    assert torch.equal(together.tokens, apart.tokens)
    assert [token for token, _ in together.result()] == together.tokens.tolist()
    for (_, ours), (_, theirs) in zip(together.result(), apart.result(), strict=True):
        assert ours is not None
        assert theirs is not None
        assert unpack(ours)[0].logprob == pytest.approx(unpack(theirs)[0].logprob, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_ask_for_nothing_are_drawn_as_by_the_long_way(dtype: torch.dtype) -> None:
    logits = _logits(6).to(dtype)
    logits[2, 5] = torch.nan
    plain = [_sequence(temperature=0.0) for _ in range(6)]
    assert all(sequence.is_greedy for sequence in plain)
    expected = _drawn(logits, plain, [0] * 6).tokens.tolist()
    assert [token for token, _ in draw(logits, plain)] == expected
    assert expected[2] == NOT_FINITE


@pytest.mark.parametrize("asked", [one for one in ASKED if one] + [{"logprobs": 0}, {"temperature": 0.5}], ids=str)
def test_who_asks_for_something_goes_the_long_way(asked: dict[str, Any]) -> None:
    assert not _sequence(**{"temperature": 0.0, **asked}).is_greedy

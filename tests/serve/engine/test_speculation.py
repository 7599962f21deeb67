"""Drafts change when tokens come, and never which."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from onebase.adapters.program import LowRank, SiteOps
from onebase.serve.engine import ngram
from onebase.serve.engine.chunk import Chunk
from onebase.serve.engine.config import EngineConfig
from onebase.serve.engine.logprobs import unpack
from onebase.serve.engine.messages import Grammar, Request, SamplingParams, TokenOutput
from onebase.serve.engine.ngram import Lookup
from onebase.serve.engine.pages import PageAllocator
from onebase.serve.engine.scheduler import Scheduler
from onebase.serve.engine.sequence import Sequence
from onebase.serve.engine.speculation import Speculation, may_be_drafted
from onebase.serve.engine.stats import Counters

from .programs import Programs

REPEATS = [5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6]


def _plainly(tokens: list[int], most: int, low: int, high: int) -> tuple[int, ...]:
    for length in range(min(high, len(tokens) - 1), low - 1, -1):
        for start in range(len(tokens) - length - 1, -1, -1):
            if tokens[start : start + length] == tokens[-length:]:
                found = list(tokens)
                for _ in range(most):
                    found.append(found[len(found) - len(tokens) + start + length])
                return tuple(found[len(tokens) :])
    return ()


@given(
    tokens=st.lists(st.sampled_from([0, 1, 255, 256, 257, 65536, 65537]), max_size=24),
    most=st.integers(1, 5),
    low=st.integers(1, 3),
    more=st.integers(0, 2),
)
def test_a_lookup_finds_what_followed_the_latest_match(tokens: list[int], most: int, low: int, more: int) -> None:
    lookup = Lookup()
    for count in range(len(tokens) + 1):
        lookup.catch_up([-1, -2, *tokens[:count]], first=2)
        assert lookup.propose(most, low, low + more) == _plainly(tokens[:count], most, low, low + more)


def test_a_lookup_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ngram, "WINDOW", 4)
    lookup = Lookup()
    lookup.catch_up([1, 2, 3, 4, 5, 1])
    assert lookup.propose(2, 1, 2) == ()


@pytest.fixture(scope="module")
def plain(make_driver: Callable[..., Any]) -> Any:
    return make_driver("llama", max_model_len=64)


@pytest.fixture(scope="module")
def drafting(make_driver: Callable[..., Any]) -> Any:
    return make_driver("llama", max_model_len=64, speculate="ngram", ngram_min=1, speculative_tokens=6)


def _wrap(driver: Any) -> Programs:
    programs = Programs(driver)
    generator = torch.Generator().manual_seed(2)
    pair = (torch.randn(3, 64, generator=generator) * 0.2 for _ in range(2))
    programs.add("lora", {"model.layers.0.self_attn.o_proj": SiteOps(LowRank(*pair, 1.0))})
    return programs


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0])
def test_outputs_are_those_without_drafts(adapted: bool, temperature: float, plain: Any, drafting: Any) -> None:
    said = []
    for driver in (plain, drafting):
        uses = (_wrap(driver).use("lora"),) if adapted else ()
        ids = [
            driver.submit(REPEATS, *uses, max_tokens=40, temperature=temperature, seed=seed, logit_bias=((5, 3.0),))
            for seed in range(4)
        ]
        driver.run()
        said.append([driver.outputs[name] for name in ids])
    assert said[0] == said[1]


def test_text_that_repeats_takes_fewer_steps(plain: Any, drafting: Any) -> None:
    """Two tokens that the bias leaves to choose from."""
    steps, before = [], drafting.engine.stats()
    for driver in (plain, drafting):
        start = driver.engine.counters.steps
        driver.generate([9, 9, 9], max_tokens=50, logit_bias=((5, 40.0), (6, 39.0)))
        steps.append(driver.engine.counters.steps - start)
    after = drafting.engine.stats()
    accepted = after.accepted_tokens - before.accepted_tokens
    assert accepted == steps[0] - steps[1] > 10
    assert after.drafted_tokens - before.drafted_tokens >= accepted


def test_a_stop_token_inside_the_drafts_ends_there(plain: Any, drafting: Any) -> None:
    options = {"max_tokens": 50, "temperature": 1.0, "logit_bias": ((5, 40.0), (6, 40.0), (7, 36.0))}
    before = drafting.engine.stats().accepted_tokens
    for seed in range(8):
        expected = plain.generate([9, 9, 9], stop_token_ids=(7,), seed=seed, **options)
        assert drafting.generate([9, 9, 9], stop_token_ids=(7,), seed=seed, **options) == expected
    assert drafting.engine.stats().accepted_tokens > before


def test_log_probabilities_are_told_of_every_token(plain: Any, drafting: Any) -> None:
    told: list[list[float]] = []
    for driver in (plain, drafting):
        sampling = SamplingParams(30, 0.0, ignore_eos=True, logprobs=2, logit_bias=((5, 40.0), (6, 39.0)))
        driver.engine.add(Request("told", (9, 9, 9), sampling))
        found: list[float] = []
        while driver.engine.has_work:
            for output in driver.engine.step():
                assert isinstance(output, TokenOutput)
                assert output.logprobs is not None
                found += [one.logprob for one in unpack(output.logprobs)]
        told.append(found)
    assert len(told[0]) == len(told[1]) == 30
    torch.testing.assert_close(told[0], told[1], atol=1e-4, rtol=0)


def test_rejected_drafts_are_in_no_cached_page(plain: Any, make_driver: Callable[..., Any]) -> None:
    """Every answer of requests that begin with another one's answer, over pages that drafts were written to."""
    driver = make_driver("llama", max_model_len=64, speculate="ngram", ngram_min=1, speculative_tokens=6, page_size=4)
    options = {"max_tokens": 24, "temperature": 1.0, "logit_bias": ((5, 40.0), (6, 40.0), (7, 38.0))}
    for seed in range(8):
        answer = driver.generate(REPEATS, seed=seed, **options)
        follow = [*REPEATS, *answer, 3]
        expected = plain.generate(follow, max_tokens=6)
        assert driver.generate(follow, max_tokens=6) == expected
    stats = driver.engine.stats()
    assert 0 < stats.accepted_tokens < stats.drafted_tokens
    assert stats.cached_tokens > 8 * len(REPEATS)


def test_drafts_take_only_tokens_and_pages_that_are_to_spare() -> None:
    """Seven of a page's eight slots are computed; drafts would need a second page."""
    sequence = Sequence.of(Request("one", (5, 6, 5, 6, 5, 6, 5, 6), SamplingParams(max_tokens=16)), 0)
    sequence.num_computed = 7
    for num_pages, budget, expected in ((1, 9, ()), (2, 9, ()), (3, 9, (5, 6, 5, 6)), (9, 3, (5, 6)), (9, 1, ())):
        pages = PageAllocator(num_pages, 8)
        sequence.pages = pages.allocate(1) or []
        scheduler = Scheduler(pages, max_batch_tokens=64, max_num_seqs=4)
        scheduler.limit.now = budget  # after a step that did not fit
        speculation = Speculation(EngineConfig("m", speculate="ngram"), scheduler, Counters())
        (chunk,) = speculation.lengthened([Chunk(sequence, 1, samples=True)])
        assert (chunk.drafts, chunk.num_tokens, chunk.num_draws) == (expected, 1 + len(expected), 1 + len(expected))
        assert len(sequence.pages) == 1 + bool(expected)


@pytest.mark.parametrize(
    "options",
    [
        {"presence_penalty": 0.5},
        {"frequency_penalty": 0.5},
        {"repetition_penalty": 1.1},
        {"min_tokens": 3},
        {"grammar": Grammar("regex", "a*")},
    ],
)
def test_who_is_not_drafted(options: dict[str, Any]) -> None:
    assert may_be_drafted(Sequence.of(Request("plain", (1,), SamplingParams()), 0))
    assert not may_be_drafted(Sequence.of(Request("other", (1,), SamplingParams(**options)), 0))


def test_a_step_with_drafts_that_fails_is_run_without_them(
    plain: Any, drafting: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, failed = drafting.engine.runner.forward, list[int]()

    def limited(chunks: list[Chunk], unseen: Any = None) -> Any:
        if sum(chunk.num_tokens for chunk in chunks) > 3:
            failed.append(len(chunks))
            raise torch.OutOfMemoryError("no room for so many rows")
        return forward(chunks, unseen)

    options = {"max_tokens": 20, "logit_bias": ((5, 40.0), (6, 39.0))}
    expected = plain.generate([9, 9, 9], **options)
    monkeypatch.setattr(drafting.engine.runner, "forward", limited)
    assert drafting.generate([9, 9, 9], **options) == expected
    assert failed

"""Forwards and draws that raise, anywhere: only who cannot run alone fails, and everybody else is answered as alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from onebase.adapters.program import SiteOps
from onebase.kernels.ops.prefix import GatedPrefix
from onebase.serve.engine.messages import Failure
from onebase.serve.engine.recovery import CALM, TokenLimit, is_out_of_memory

from .programs import Programs

Make = Callable[..., Any]
POISON = 77
OVERLAP = pytest.mark.parametrize("overlap", [True, False])


def _jobs(count: int) -> list[list[int]]:
    rng = random.Random(count)
    return [[rng.randrange(3, 70) for _ in range(rng.randrange(1, 30))] for _ in range(count)]


def _alone(driver: Any, jobs: list[list[int]], *uses: Any, **sampling: Any) -> list[list[int]]:
    return [driver.generate(prompt, *uses, **sampling) for prompt in jobs]


@contextmanager
def _failing(driver: Any, fails: Callable[[Any], Exception | None], *, late: bool = False) -> Iterator[None]:
    """Every attention call of a forward (late: every call of the last layer's feed-forward block) asks whether it is to
    raise."""
    context = driver.engine.runner._base.context
    target = driver.engine.runner._base.model.model.layers[-1].mlp if late else context
    name = "forward" if late else "body"
    inner = getattr(target, name)

    def outer(*args: Any) -> Any:
        error = fails(context.batch)
        if error is not None:
            raise error
        return inner(*args)

    setattr(target, name, outer)
    try:
        yield
    finally:
        setattr(target, name, inner)


def _memory() -> Exception:
    return torch.OutOfMemoryError("CUDA out of memory")


@OVERLAP
@pytest.mark.parametrize("error", [_memory, MemoryError], ids=["device", "host"])
def test_memory_that_lacks_now_and_then_costs_nobody(overlap: bool, error: Any, make_driver: Make) -> None:
    """At any call, of prompts and of decoding; a step that is cut down to one row passes in the end."""
    driver = make_driver("llama", max_model_len=64, overlap=overlap, max_batch_tokens=48, max_num_seqs=8)
    jobs, rng = _jobs(16), random.Random(3)
    want = _alone(driver, jobs, temperature=0.7, seed=5, logprobs=1)
    ids = [driver.submit(prompt, temperature=0.7, seed=5, logprobs=1) for prompt in jobs]
    with _failing(driver, lambda batch: error() if batch.num_tokens > 1 and rng.random() < 0.1 else None):
        driver.run()
    assert [driver.outputs[request_id] for request_id in ids] == want
    assert not driver.failures
    assert driver.engine.stats().memory_failures > 3


@OVERLAP
def test_steps_become_small_enough_and_large_again(overlap: bool, make_driver: Make) -> None:
    driver = make_driver("llama", max_model_len=64, overlap=overlap, max_batch_tokens=32, max_num_seqs=8)
    jobs, limit = _jobs(12), driver.engine.scheduler.limit
    want = _alone(driver, jobs)
    ids = [driver.submit(prompt) for prompt in jobs]
    with _failing(driver, lambda batch: _memory() if batch.num_tokens > 3 else None, late=True):
        driver.run()
        assert limit.now <= 6
        failures = driver.engine.stats().memory_failures
        assert failures < 30, "steps are planned smaller, not tried in full each time"
    assert [driver.outputs[request_id] for request_id in ids] == want
    for _ in range(8):
        driver.generate([5, 6], max_tokens=50)
    assert limit.now == 32


@OVERLAP
@pytest.mark.parametrize(("error", "kind"), [(_memory, "OutOfMemory"), (lambda: RuntimeError("x"), "EngineError")])
def test_only_the_request_that_cannot_run_alone_fails(
    overlap: bool, error: Any, kind: str, make_driver: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever it raises, in whatever company; and it can run again once the cause has gone."""
    driver = make_driver("llama", max_model_len=64, overlap=overlap, max_batch_tokens=48)
    jobs = _jobs(9)
    jobs[4] = [8] * 20 + [POISON, 9]
    want = _alone(driver, jobs)
    ids = [driver.submit(prompt) for prompt in jobs]
    embed = driver.engine.runner._base.model.model.embed_tokens
    inner = embed.forward

    def outer(tokens: torch.Tensor) -> torch.Tensor:
        if (tokens == POISON).any():
            raise error()
        found: torch.Tensor = inner(tokens)
        return found

    embed.forward = outer
    driver.run()
    embed.forward = inner
    assert list(driver.failures) == [ids[4]]
    failed = driver.failures[ids[4]]
    assert isinstance(failed, Failure)
    assert failed.kind == kind
    assert "x" not in failed.message.split(), "what the forward said is for the log"
    assert "run again in parts" in caplog.text
    others = [index for index in range(9) if index != 4]
    assert [driver.outputs[ids[index]] for index in others] == [want[index] for index in others]
    assert driver.generate(jobs[4]) == want[4]


def test_draws_that_find_no_memory_are_drawn_again(make_driver: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    for overlap in (True, False):
        driver = make_driver("llama", max_model_len=64, overlap=overlap)
        jobs, pipeline = _jobs(6), driver.engine._pipeline
        options = {"temperature": 0.8, "seed": 1, "presence_penalty": 0.5}
        want = _alone(driver, jobs, **options)
        ids = [driver.submit(prompt, **options) for prompt in jobs]
        begin, rng = pipeline._begin, random.Random(1)

        def flaky(logits: Any, rows: Any, *rest: Any, begin: Any = begin, rng: Any = rng) -> Any:
            if len(rows) > 1 and rng.random() < 0.4:
                raise _memory()
            return begin(logits, rows, *rest)

        monkeypatch.setattr(pipeline, "_begin", flaky)
        driver.run()
        assert [driver.outputs[request_id] for request_id in ids] == want
        assert not driver.failures


def test_what_a_forward_left_for_its_later_modules_is_forgotten(make_driver: Make) -> None:
    """A gated prefix hands its rows to the end of the attention module; the forward ends in between."""
    driver = make_driver("llama", max_model_len=64)
    draw = torch.Generator().manual_seed(4)
    pair = torch.randn(2, 5, 2, 16, generator=draw)
    programs = Programs(driver)
    ops = {"model.layers.1.self_attn": SiteOps(extra=(GatedPrefix(*pair, torch.ones(1), projected=False),))}
    programs.add("gated", ops)
    use, (prompt,) = programs.use("gated"), _jobs(1)
    want = driver.generate(prompt, use), driver.generate([9, *prompt])
    project = driver.engine.runner._base.model.model.layers[1].self_attn.o_proj
    inner, calls = project.forward, iter([RuntimeError("once")])

    def outer(x: torch.Tensor) -> torch.Tensor:
        for error in calls:
            raise error
        found: torch.Tensor = inner(x)
        return found

    project.forward = outer
    failed = driver.submit(prompt, use)
    driver.run()
    assert driver.failures[failed].kind == "EngineError"
    assert (driver.generate(prompt, use), driver.generate([9, *prompt])) == want


def test_what_counts_as_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 46, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_the_limit_halves_at_once_and_doubles_after_calm() -> None:
    limit = TokenLimit(100)
    limit.shrink(80)
    assert limit.now == 40
    limit.shrink(100)
    assert limit.now == 40, "a larger step says nothing new"
    for expected in (80, 100, 100):
        for _ in range(CALM):
            limit.grow()
        assert limit.now == expected
    limit.shrink(1)
    assert limit.now == 1

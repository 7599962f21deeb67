"""Embeddings of the engine: what is read in one go, in chunks, after preemptions, from the prefix cache."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from onebase.serve.engine.messages import Failure, Request, SamplingParams, TokenOutput

PROMPT = [5, 99, 23, 7, 64, 31, 5, 99, 23, 8, 90, 12, 77, 3, 41, 6, 19, 55, 4, 28]
KINDS = ("last", "mean")


class Embeddings:
    """Embeds over a driver: request id -> float32 [width]."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver
        self.found: dict[str, Tensor] = {}
        self.cached: dict[str, int] = {}
        self.asked = 0
        take = driver._take

        def hear(outputs: list[Any]) -> None:
            for output in outputs:
                if isinstance(output, TokenOutput) and output.embedding is not None:
                    assert output.finish_reason == "length"
                    assert output.id not in self.found
                    self.found[output.id] = torch.from_numpy(np.frombuffer(output.embedding, np.float32).copy())
                    self.cached[output.id] = output.cached_tokens
            take(outputs)

        driver._take = hear

    def ask(self, prompt: list[int], kind: Any, max_tokens: int = 0) -> str:
        self.asked += 1
        request = Request(f"e{self.asked}", tuple(prompt), SamplingParams(max_tokens), embeds=kind)
        self.driver._take(self.driver.engine.add(request))
        return request.id

    def of(self, prompt: list[int], kind: str) -> Tensor:
        request_id = self.ask(prompt, kind)
        self.driver.run()
        return self.found[request_id]


@pytest.fixture(scope="module")
def expected(checkpoint: Callable[..., Path]) -> Callable[[list[int], str], Tensor]:
    """Of transformers: the states after the last norm."""
    model = transformers.AutoModel.from_pretrained(checkpoint("llama"), attn_implementation="eager").eval()

    def of(prompt: list[int], kind: str) -> Tensor:
        with torch.inference_mode():
            states: Tensor = model(input_ids=torch.tensor([prompt])).last_hidden_state[0].float()
        return states.mean(0) if kind == "mean" else states[-1]

    return of


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options", [{}, {"max_batch_tokens": 3}, {"deterministic": True}], ids=["whole", "chunks", "d"]
)
def test_states_are_those_of_transformers(
    options: Any, kind: str, expected: Any, make_driver: Callable[..., Any]
) -> None:
    found = Embeddings(make_driver("llama", **options)).of(PROMPT, kind)
    torch.testing.assert_close(found, expected(PROMPT, kind), atol=1e-4, rtol=0)


def test_the_prefix_cache_gives_what_nobody_reads(expected: Any, make_driver: Callable[..., Any]) -> None:
    embeddings = Embeddings(make_driver("llama"))
    embeddings.driver.generate(PROMPT, max_tokens=2)
    for kind, cached in (("mean", 0), ("last", 16)):
        found = embeddings.of(PROMPT, kind)
        assert embeddings.cached[f"e{embeddings.asked}"] == cached, kind
        torch.testing.assert_close(found, expected(PROMPT, kind), atol=1e-4, rtol=0)


@pytest.mark.parametrize("overlap", [False, True])
def test_any_schedule_with_preemptions(overlap: bool, expected: Any, make_driver: Callable[..., Any]) -> None:
    """Little room, small steps, and sequences that grow: prompts are read again, their rows only once."""
    driver = make_driver("llama", kv_memory=0.00009, max_batch_tokens=7, max_num_seqs=5, overlap=overlap)
    embeddings, draw = Embeddings(driver), random.Random(1)
    asked = {}
    for _ in range(12):
        prompt = [draw.randrange(3, 128) for _ in range(draw.randrange(1, 60))]
        kind = draw.choice(KINDS)
        asked[embeddings.ask(prompt, kind)] = (prompt, kind)
        driver.submit(prompt[:20], max_tokens=40)
    driver.run()
    assert driver.engine.scheduler.preemptions, "nothing was tried"
    for request_id, (prompt, kind) in asked.items():
        torch.testing.assert_close(embeddings.found[request_id], expected(prompt, kind), atol=1e-4, rtol=0)


def test_deterministic_bits_do_not_depend_on_chunks_or_company(make_driver: Callable[..., Any]) -> None:
    alone = Embeddings(make_driver("llama", deterministic=True))
    busy = Embeddings(make_driver("llama", deterministic=True, max_batch_tokens=5))
    for kind in KINDS:
        for other in (PROMPT[::-1], PROMPT[:7]):
            busy.driver.submit(other, max_tokens=5)
        assert torch.equal(busy.of(PROMPT, kind), alone.of(PROMPT, kind))


def test_an_embedding_generates_nothing(make_driver: Callable[..., Any]) -> None:
    embeddings = Embeddings(make_driver("llama"))
    request_id = embeddings.ask(PROMPT, "last", max_tokens=1)
    failure = embeddings.driver.failures[request_id]
    assert isinstance(failure, Failure)
    assert "max_tokens must be 0" in failure.message


@pytest.mark.parametrize("kind", KINDS)
def test_states_that_overflow_are_an_error(kind: str, make_driver: Callable[..., Any]) -> None:
    embeddings = Embeddings(make_driver("llama"))
    model = embeddings.driver.engine.runner._base.model
    model.model.norm.weight.data.fill_(float("inf"))
    request_id = embeddings.ask(PROMPT, kind)
    embeddings.driver.run()
    assert embeddings.driver.failures[request_id].kind == "EngineError"

"""Requests that classify: what the heads read, in any schedule; refusals; the heads' place in the arena."""

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

from onebase.adapters.program import Head, LowRank, SiteOps
from onebase.serve.engine.messages import Failure, Request, SamplingParams, TokenOutput

from .programs import PROMPT, Programs

SITE = "model.layers.0.self_attn.q_proj"
PAD = 0  # of the tiny Llama
LABELS = {"sequence": 3, "tokens": 5, "adapted": 2}


def _programs(driver: Any) -> Programs:
    """Heads alone, one beside low rank, and low rank alone."""
    programs, draw = Programs(driver), torch.Generator().manual_seed(2)
    heads = {
        name: Head(torch.randn(count, 64, generator=draw) * 0.2, torch.randn(count, generator=draw), name == "tokens")
        for name, count in LABELS.items()
    }
    low_rank = LowRank(torch.randn(4, 64, generator=draw) * 0.2, torch.randn(4, 64, generator=draw), 1.0)
    programs.add("sequence", {}, head=heads["sequence"])
    programs.add("tokens", {}, head=heads["tokens"])
    programs.add("adapted", {SITE: SiteOps(low_rank=low_rank)}, head=heads["adapted"])
    programs.add("plain", {SITE: SiteOps(low_rank=low_rank)})
    return programs


class Classes:
    """Classifies over a driver and puts the pieces together: [1 or tokens, labels]."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver
        self.programs = _programs(driver)
        self.raw: dict[str, bytes] = {}
        self.width: dict[str, int] = {}
        self.asked = 0
        take = driver._take

        def hear(outputs: list[Any]) -> None:
            for output in outputs:
                if isinstance(output, TokenOutput) and output.classes is not None:
                    self.raw[output.id] = self.raw.get(output.id, b"") + output.classes.logits
                    self.width[output.id] = output.classes.num_labels
            take(outputs)

        driver._take = hear

    def ask(self, prompt: list[int], *names: str, scale: float = 1.0, max_tokens: int = 0) -> str:
        self.asked += 1
        uses = tuple(self.programs.use(name, scale) for name in names)
        request = Request(f"c{self.asked}", tuple(prompt), SamplingParams(max_tokens), uses, classifies=True)
        self.driver._take(self.driver.engine.add(request))
        return request.id

    def told(self, request_id: str) -> Tensor:
        assert self.driver.outputs[request_id] == []
        values = np.frombuffer(self.raw[request_id], np.float32).copy()
        return torch.from_numpy(values).view(-1, self.width[request_id])

    def classify(self, prompt: list[int], *names: str, scale: float = 1.0) -> Tensor:
        request_id = self.ask(prompt, *names, scale=scale)
        self.driver.run()
        return self.told(request_id)


@pytest.fixture(scope="module")
def hidden(checkpoint: Callable[..., Path]) -> Callable[[list[int]], Tensor]:
    """What the plain base's output head reads: [tokens, width]."""
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint("llama"), attn_implementation="eager").eval()

    def read(prompt: list[int]) -> Tensor:
        with torch.inference_mode():
            state: Tensor = model.model(torch.tensor([prompt])).last_hidden_state[0]
        return state

    return read


def test_rows_are_those_that_transformers_pools(
    make_driver: Callable[..., Any], hidden: Callable[[list[int]], Tensor]
) -> None:
    classes = Classes(make_driver("llama", max_batch_tokens=4))
    heads = {name: program.head for name, program in classes.programs.made.items() if program.head is not None}
    assert heads["sequence"].bias is not None
    for prompt, at in ((PROMPT, 5), ([*PROMPT, PAD, PAD], 5), ([PAD, *PROMPT], 6), ([PAD, PAD], 0)):
        rows = hidden(prompt)
        for name in ("sequence", "tokens"):
            expected = rows @ heads[name].weight.T + heads[name].bias
            wanted = expected if name == "tokens" else expected[at : at + 1]
            torch.testing.assert_close(classes.classify(prompt, name), wanted, atol=1e-4, rtol=0)


SCHEDULES = [
    pytest.param({"max_batch_tokens": 7, "max_num_seqs": 3}, id="few tokens"),
    pytest.param({"kv_memory": 0.00006, "max_num_seqs": 8, "max_batch_tokens": 24}, id="few pages"),
    pytest.param({"deterministic": True, "max_batch_tokens": 24}, id="the same bits"),
]


@pytest.mark.parametrize("options", SCHEDULES)
def test_any_schedule_says_what_each_request_is_told_alone(
    options: dict[str, Any], make_driver: Callable[..., Any]
) -> None:
    exact = options.get("deterministic", False)
    alone = Classes(make_driver("llama", max_model_len=72, prefix_caching=False, deterministic=exact))
    crowded = Classes(make_driver("llama", max_model_len=72, **options))
    rng = random.Random(5)
    stem = [rng.randrange(3, 128) for _ in range(50)]
    jobs = [
        (stem[: rng.randrange(1, 50)] + [rng.randrange(3, 128)] + [PAD] * rng.randrange(12), rng.choice(list(LABELS)))
        for _ in range(24)
    ]
    expected = [alone.classify(prompt, name) for prompt, name in jobs]
    ids = []
    for prompt, name in jobs:
        ids.append(crowded.ask(prompt, name))
        crowded.driver.submit(prompt[:20], crowded.programs.use("plain"), max_tokens=30)
        crowded.driver.step()
    crowded.driver.run()
    for request_id, wanted in zip(ids, expected, strict=True):
        tolerance = 0 if exact else 1e-4
        torch.testing.assert_close(crowded.told(request_id), wanted, atol=tolerance, rtol=0)
    stats = crowded.driver.engine.stats()
    assert stats.cached_tokens > 0
    assert stats.preemptions > 0 or "kv_memory" not in options


def test_generation_does_not_see_the_head_and_the_head_knows_no_scale(make_driver: Callable[..., Any]) -> None:
    classes = Classes(make_driver("llama"))
    use = classes.programs.use
    generate = classes.driver.generate
    assert generate(PROMPT, use("adapted")) == generate(PROMPT, use("plain"))
    assert generate(PROMPT, use("sequence")) == generate(PROMPT)
    whole = classes.classify(PROMPT, "sequence")
    assert torch.equal(classes.classify(PROMPT, "sequence", scale=0.5), whole)
    beside = classes.classify(PROMPT, "sequence", "plain")
    assert float((beside - whole).abs().max()) > 0.01, "the other adapter changes what the head reads"


def test_refusals(make_driver: Callable[..., Any]) -> None:
    classes = Classes(make_driver("llama"))
    asked = {
        classes.ask(PROMPT): ("model", "no classification head"),
        classes.ask(PROMPT, "plain"): ("model", "no classification head"),
        classes.ask(PROMPT, "sequence", scale=0.0): ("model", "no classification head"),
        classes.ask(PROMPT, "sequence", "tokens"): ("adapters", "'sequence-as-asked' and 'tokens-as-asked'"),
        classes.ask(PROMPT, "sequence", max_tokens=1): (None, "max_tokens must be 0"),
    }
    classes.driver.run()
    for request_id, (param, message) in asked.items():
        failure = classes.driver.failures[request_id]
        assert isinstance(failure, Failure)
        assert (failure.kind, failure.param) == ("RequestRejected", param)
        assert message in failure.message


def test_heads_that_overflow_are_an_error(make_driver: Callable[..., Any]) -> None:
    classes = Classes(make_driver("llama"))
    classes.programs.add("loud", {}, head=Head(torch.full((2, 64), 3e38)))
    request_id = classes.ask(PROMPT, "loud")
    classes.driver.run()
    assert classes.driver.failures[request_id].kind == "EngineError"
    assert not classes.driver.engine.scheduler.running


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_heads_are_float32_in_the_arena_and_move_with_their_block(dtype: str, make_driver: Callable[..., Any]) -> None:
    classes = Classes(make_driver("llama", dtype=dtype))
    adapters = classes.driver.engine.adapters
    adapters.fetch("plain", "")  # before the other one, so that it leaves a gap
    before = classes.classify(PROMPT, "plain", "sequence")
    sequence = adapters.fetch("sequence", "")
    head = classes.programs.made["sequence"].head
    assert head is not None
    assert torch.equal(sequence.head.weight, head.weight)
    assert sequence.head.weight.untyped_storage().data_ptr() == adapters.arena.buffer.untyped_storage().data_ptr()
    assert sequence.nbytes >= 4 * (head.weight.numel() + head.num_labels)
    classes.classify(PROMPT, "tokens")
    block = sequence.block
    assert adapters.unload("plain")
    assert adapters.device.placement.compact(adapters.device.entries)
    assert sequence.block < block
    assert torch.equal(sequence.head.weight, head.weight)
    assert torch.equal(classes.classify(PROMPT, "plain", "sequence"), before)
    for name in ("plain", "sequence", "tokens"):
        assert adapters.unload(name)
    assert adapters.arena.used == 0

"""Log-probabilities from the engine: of prompts and of drawn tokens, whatever the schedule."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from onebase.adapters.program import LowRank, SiteOps
from onebase.kernels.ops.tokens import SoftPrompt
from onebase.serve.engine import prompts
from onebase.serve.engine.logprobs import LEAST, cut, joined, score, unpack
from onebase.serve.engine.messages import Failure

from .ear import Ear
from .programs import PROMPT, Programs

TOLERANCE = 1e-4


def test_scores_are_the_log_softmax_and_its_order() -> None:
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([3, 9, 39, 0, 7])
    expected = torch.log_softmax(logits.double(), -1)
    found = score(logits, tokens, 4)
    assert found is not None
    for row, one in enumerate(unpack(found)):
        assert one.token == tokens[row]
        assert one.logprob == pytest.approx(float(expected[row, one.token]), abs=1e-6)
        order = expected[row].argsort(descending=True)
        assert [token for token, _ in one.top] == order[:4].tolist()
        assert one.rank == order.tolist().index(one.token) + 1
        best = torch.tensor([value for _, value in one.top])
        torch.testing.assert_close(best, expected[row, order[:4]].float(), atol=1e-6, rtol=0)


def test_pieces_of_scores_join_again() -> None:
    whole = score(torch.randn(7, 30), torch.arange(7), 3)
    assert whole is not None
    pieces = [cut(whole, 0, 2, 3), cut(whole, 2, 3, 3), cut(whole, 3, 7, 3)]
    assert joined(pieces) == whole
    narrow, none = cut(whole, 2, 5, 1), cut(whole, 2, 5, 0)
    assert [one.top for one in unpack(narrow)] == [one.top[:1] for one in unpack(whole)[2:5]]
    assert [(one.token, one.logprob, one.top) for one in unpack(none)] == [
        (one.token, one.logprob, ()) for one in unpack(whole)[2:5]
    ]


def test_impossible_tokens_have_the_protocols_least_value_and_nan_has_none() -> None:
    logits = torch.zeros(1, 3)
    logits[0, 1] = -torch.inf
    found = score(logits, torch.tensor([1]), 9)
    assert found is not None
    (one,) = unpack(found)
    assert one.logprob == LEAST
    assert len(one.top) == 3
    logits[0, 2] = torch.inf
    assert score(logits, torch.tensor([0]), 1) is None


@torch.inference_mode()
def _reference(folder: Any, tokens: list[int]) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    return torch.log_softmax(model(torch.tensor([tokens])).logits[0].float(), -1)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2", "opt"])
def test_both_equal_transformers(
    architecture: str, make_driver: Callable[..., Any], checkpoint: Callable[..., Any]
) -> None:
    driver = make_driver(architecture, max_batch_tokens=9)
    ear = Ear(driver)
    rng = random.Random(1)
    texts = [[rng.randrange(3, 128) for _ in range(length)] for length in (30, 1, 17, 2)]
    ids = [
        driver.submit(text, max_tokens=5, temperature=0.7, seed=at, logprobs=at, prompt_logprobs=3 - at)
        for at, text in enumerate(texts)
    ]
    driver.submit([5, 6, 7])
    driver.run()
    for at, (request_id, prompt) in enumerate(zip(ids, texts, strict=True)):
        whole = prompt + driver.outputs[request_id]
        expected = _reference(checkpoint(architecture), whole)
        said = [*ear.prompt.get(request_id, []), *ear.drawn[request_id]]
        assert [one.token for one in said] == whole[1:]
        for position, one in enumerate(said):
            row = expected[position]
            assert one.logprob == pytest.approx(float(row[one.token]), abs=TOLERANCE)
            width = 3 - at if position < len(prompt) - 1 else at
            assert len(one.top) == width
            for (_, value), best in zip(one.top, row.topk(width).values, strict=True):
                assert value == pytest.approx(float(best), abs=TOLERANCE)


def test_the_slices_do_not_matter(make_driver: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(2)
    texts = [[rng.randrange(3, 128) for _ in range(length)] for length in (13, 21, 8)]
    said = []
    for block in (prompts.BLOCK, 5 * 128):
        monkeypatch.setattr(prompts, "BLOCK", block)
        driver = make_driver("llama")
        ear = Ear(driver)
        ids = [driver.submit(text, max_tokens=1, prompt_logprobs=2) for text in texts]
        driver.run()
        said.append([ear.prompt[request_id] for request_id in ids])
    for one, other in zip(*said, strict=True):
        assert [score.token for score in one] == [score.token for score in other]
        for a, b in zip(one, other, strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=1e-5)


def test_no_more_logits_at_once_than_a_slice(make_driver: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the prompts' lengths: the head runs over the rows of a slice, and over those that draw."""
    monkeypatch.setattr(prompts, "BLOCK", 5 * 128)
    driver = make_driver("llama")
    rows: list[int] = []
    head = driver.engine.runner._base.model.get_output_embeddings()
    handle = head.register_forward_hook(lambda module, args, output: rows.append(output.numel() // 128))
    rng = random.Random(4)
    for length in (90, 31, 4):
        driver.submit([rng.randrange(3, 128) for _ in range(length)], max_tokens=1, prompt_logprobs=2)
    driver.run()
    handle.remove()
    assert max(rows) == 5
    assert sum(rows) >= 90 + 31 + 4 - 3


def test_preempted_prompts_are_told_once(make_driver: Callable[..., Any]) -> None:
    driver = make_driver("llama", max_model_len=64, kv_memory=0.00012, max_num_seqs=8, max_batch_tokens=11)
    ear = Ear(driver)
    rng = random.Random(3)
    jobs = {}
    for _ in range(10):
        text = [rng.randrange(3, 128) for _ in range(rng.randrange(1, 40))]
        jobs[driver.submit(text, max_tokens=20, prompt_logprobs=0)] = text
        driver.step()
    driver.run()
    assert driver.engine.stats().preemptions > 0
    for request_id, text in jobs.items():
        assert [one.token for one in ear.prompt.get(request_id, [])] == text[1:]


def test_a_request_for_no_tokens_ends_with_its_prompt(make_driver: Callable[..., Any]) -> None:
    """Up to the whole context, which leaves no room for a token."""
    driver = make_driver("llama", max_model_len=32, kv_memory=0.00004)
    ear = Ear(driver)
    request_id = driver.submit(list(range(3, 35)), max_tokens=0, prompt_logprobs=1)
    driver.run()
    assert driver.outputs[request_id] == []
    assert len(ear.prompt[request_id]) == 31
    assert not driver.failures
    assert driver.engine.stats().generated_tokens == 0
    too_long = driver.submit(list(range(3, 36)), max_tokens=0, prompt_logprobs=1)
    assert isinstance(driver.failures[too_long], Failure)


def test_logits_that_are_not_finite_fail_the_prompt(make_driver: Callable[..., Any]) -> None:
    driver = make_driver("gpt2")
    embedding = driver.engine.runner._base.model.get_input_embeddings()
    embedding.weight[50] = float("nan")
    request_id = driver.submit([4, 50, 5], prompt_logprobs=0)
    driver.run()
    assert "not finite" in driver.failures[request_id].message


def test_prompts_behind_virtual_tokens_and_activated_adapters(
    make_driver: Callable[..., Any], checkpoint: Callable[..., Any]
) -> None:
    """Against transformers' own model over the embeddings themselves, and over a matrix changed from a token on."""
    driver = make_driver("llama", max_batch_tokens=5)
    programs, ear = Programs(driver), Ear(driver)
    generator = torch.Generator().manual_seed(0)
    soft = torch.randn(3, 64, generator=generator)
    programs.add(
        "soft", {"model.embed_tokens": SiteOps(extra=(SoftPrompt(soft),))}, num_virtual_tokens=3, first_position=3
    )
    a, b = torch.randn(2, 64, generator=generator), torch.randn(128, 2, generator=generator)
    programs.add("late", {"lm_head": SiteOps(low_rank=LowRank(a, b.T.contiguous(), 1.0))}, invocation=(64,))
    soft_id, late_id = (
        driver.submit(PROMPT, programs.use(name), max_tokens=1, prompt_logprobs=1) for name in ("soft", "late")
    )
    driver.run()
    assert not driver.failures
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint("llama"), attn_implementation="eager").eval()
    with torch.inference_mode():
        embedded = torch.cat([soft, model.get_input_embeddings()(torch.tensor(PROMPT))])
        behind = torch.log_softmax(model(inputs_embeds=embedded[None]).logits[0, 3:].float(), -1)
        hidden = model.model(torch.tensor([PROMPT])).last_hidden_state[0]
        logits = model.lm_head(hidden)
        logits[PROMPT.index(64) :] += (hidden @ a.T @ b.T)[PROMPT.index(64) :]
    for request_id, expected in ((soft_id, behind), (late_id, torch.log_softmax(logits, -1))):
        said = ear.prompt[request_id]
        assert [one.token for one in said] == PROMPT[1:]
        for position, one in enumerate(said):
            assert one.logprob == pytest.approx(float(expected[position, one.token]), abs=TOLERANCE)
            assert one.top[0][1] == pytest.approx(float(expected[position].max()), abs=TOLERANCE)

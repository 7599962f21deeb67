"""Overlapped steps against the plain loop, which is their definition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from onebase.adapters.program import LowRank, SiteOps
from onebase.kernels.ops.tokens import SoftPrompt, TokenRows
from onebase.serve.engine.config import EngineConfig, overlaps
from onebase.serve.engine.messages import Failure

from .programs import Programs

PROMPT = [9, 8, 7]


@pytest.fixture(scope="module")
def plain(make_driver: Callable[..., Any]) -> Any:
    return make_driver("llama", max_model_len=40, overlap=False)


@pytest.fixture(scope="module")
def overlapped(make_driver: Callable[..., Any]) -> Any:
    return make_driver("llama", max_model_len=40, overlap=True)


def _steps(driver: Any) -> int:
    steps: int = driver.engine.counters.steps
    return steps


def test_tokens_are_delivered_one_step_later_and_are_the_same(plain: Any, overlapped: Any) -> None:
    options = {"max_tokens": 9, "temperature": 1.0, "seed": 4}
    said = [driver.submit(PROMPT, **options) for driver in (plain, overlapped)]
    plain.step()
    overlapped.step()
    assert len(plain.outputs[said[0]]) == 1
    assert said[1] not in overlapped.outputs
    plain.run()
    overlapped.run()
    assert overlapped.outputs[said[1]] == plain.outputs[said[0]]


@pytest.mark.parametrize("options", [{"max_tokens": 6}, {"max_tokens": 500}, {"max_tokens": 0}])
def test_an_end_that_is_known_ahead_costs_no_row(options: dict[str, int], plain: Any, overlapped: Any) -> None:
    """By max_tokens, by the context, and a prompt that nothing follows."""
    steps = []
    for driver in (plain, overlapped):
        before = _steps(driver)
        driver.submit(PROMPT, **options)
        driver.run()
        steps.append(_steps(driver) - before)
    assert steps[0] == steps[1]


def test_a_stop_token_costs_one_row_that_nobody_reads(plain: Any, overlapped: Any) -> None:
    text = plain.generate(PROMPT, max_tokens=12)
    stop = text[5]
    before = [_steps(driver) for driver in (plain, overlapped)]
    said = [driver.generate(PROMPT, max_tokens=12, stop_token_ids=(stop,)) for driver in (plain, overlapped)]
    assert said[0] == said[1] == text[: text.index(stop) + 1]
    spent = [_steps(driver) - start for driver, start in zip((plain, overlapped), before, strict=True)]
    assert spent[1] == spent[0] + 1
    pages = overlapped.engine.scheduler.pages
    assert pages.num_free == pages.num_pages


def test_an_id_can_be_used_again_while_its_last_step_is_under_way(overlapped: Any) -> None:
    """What was drawn for the one that left is not the new one's."""
    expected = overlapped.generate([5, 6], max_tokens=4)
    first = overlapped.submit(PROMPT, max_tokens=10)
    overlapped.step()
    overlapped.engine.abort(first)
    overlapped.made -= 1
    assert overlapped.submit([5, 6], max_tokens=4) == first
    overlapped.run()
    assert overlapped.outputs[first] == expected


def test_a_preempted_sequence_keeps_the_token_that_is_under_way(
    plain: Any, make_driver: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    crowd = make_driver("llama", max_model_len=40, kv_memory=0.00002, max_num_seqs=6, overlap=True)
    preempt, unseen = crowd.engine.scheduler._preempt, list[int]()
    monkeypatch.setattr(
        crowd.engine.scheduler, "_preempt", lambda one, *rest: unseen.append(one.num_unseen) or preempt(one, *rest)
    )
    prompts = [[9, 8, 7 + seed] for seed in range(6)]
    expected = [plain.generate(prompt, max_tokens=30) for prompt in prompts]
    ids = [crowd.submit(prompt, max_tokens=30) for prompt in prompts]
    crowd.run()
    assert [crowd.outputs[name] for name in ids] == expected
    assert 1 in unseen, "else this proves little"


def test_logits_that_overflow_end_their_request_alone(make_driver: Callable[..., Any], plain: Any) -> None:
    driver = make_driver("llama", max_model_len=40, overlap=True)
    programs = Programs(driver)
    wild = {"model.layers.1.mlp.down_proj": SiteOps(LowRank(torch.full((1, 96), 1e30), torch.full((1, 64), 1e30), 1.0))}
    programs.add("wild", wild)
    expected = plain.generate(PROMPT, max_tokens=6)
    kept, lost = driver.submit(PROMPT, max_tokens=6), driver.submit(PROMPT, programs.use("wild"), max_tokens=6)
    driver.run()
    assert driver.outputs[kept] == expected
    assert isinstance(driver.failures[lost], Failure)
    assert "not finite" in driver.failures[lost].message


@pytest.mark.parametrize(
    ("device", "options", "expected"),
    [
        ("cpu", {}, False),
        ("cuda:0", {}, True),
        ("cpu", {"overlap": True}, True),
        ("cuda:0", {"overlap": False}, False),
        ("cuda:0", {"overlap": True, "deterministic": True}, False),
    ],
)
def test_where_steps_overlap(device: str, options: dict[str, bool], expected: bool) -> None:
    assert overlaps(EngineConfig("m", **options), device) is expected


def test_rows_of_tokens_are_those_of_unseen_tokens_beside_virtual_ones(plain: Any, overlapped: Any) -> None:
    """Embeddings read other ids where a soft prompt is in the batch: the tokens that the host has not seen as well."""
    draw = torch.Generator().manual_seed(3)
    rows = TokenRows(torch.arange(1, 128, dtype=torch.int32), torch.randn(127, 64, generator=draw))
    soft = SoftPrompt(torch.randn(5, 64, generator=draw))
    said = []
    for driver in (plain, overlapped):
        programs = Programs(driver)
        programs.add("every-row", {"model.embed_tokens": SiteOps(extra=(rows,))})
        programs.add("soft", {"model.embed_tokens": SiteOps(extra=(soft,))}, num_virtual_tokens=5, first_position=5)
        alone = driver.generate(PROMPT, programs.use("every-row"), max_tokens=12)
        driver.generate([4], programs.use("soft"), max_tokens=1)
        request = driver.submit(PROMPT, programs.use("every-row"), max_tokens=12)
        while len(driver.outputs.get(request, [])) < 2:
            driver.step()
        for token in (5, 6, 7):
            driver.submit([token], programs.use("soft"), max_tokens=1)
            driver.step()
        driver.run()
        assert driver.outputs[request] == alone
        said.append(alone)
    assert said[0] == said[1]

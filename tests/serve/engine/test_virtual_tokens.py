"""Adapters with virtual tokens, invocations and gated prefixes in the engine: schedules, limits, what is reported."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from onebase.serve.engine.messages import Request, SamplingParams, TokenOutput

from .programs import lora_tensors

INVOCATION = (7, 8)
_PROMPT = {"num_virtual_tokens": 11, "num_layers": 2, "num_transformer_submodules": 1}


def _folder(path: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def adapters(make_driver: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """soft: 11 virtual tokens; stored: 11 slots of keys and values; alora: from 7, 8 on; gated: at the top layer."""
    root = tmp_path_factory.mktemp("virtual")
    draw = torch.Generator().manual_seed(3)
    lora = lora_tensors(make_driver("llama").base_sites(), 4, draw)
    rows, table = (torch.randn(11, width, generator=draw) for width in (64, 2 * 2 * 2 * 16))
    attention = "base_model.model.model.layers.1.self_attn.adaption"
    gated = {f"{attention}_prompt": torch.randn(1, 5, 64, generator=draw), f"{attention}_gate": torch.ones(1) * 2}
    activated = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "alora_invocation_tokens": list(INVOCATION)}
    return {
        "soft": _folder(root / "soft", {"peft_type": "PROMPT_TUNING", **_PROMPT}, {"prompt_embeddings": rows}),
        "stored": _folder(root / "stored", {"peft_type": "PREFIX_TUNING", **_PROMPT}, {"prompt_embeddings": table}),
        "alora": _folder(root / "alora", activated, lora),
        "gated": _folder(
            root / "gated", {"peft_type": "ADAPTION_PROMPT", "adapter_len": 5, "adapter_layers": 1}, gated
        ),
    }


def _jobs(adapters: dict[str, Path], count: int) -> list[dict[str, Any]]:
    """Prompts that begin alike, some with invocations."""
    rng = random.Random(4)
    stem = [rng.randrange(10, 128) for _ in range(30)]
    return [
        {
            "prompt": stem[: rng.randrange(1, 30)] + rng.choice([[], list(INVOCATION)]) + [rng.randrange(10, 128)],
            "adapter": rng.choice([None, *adapters.values()]),
            "max_tokens": rng.randrange(1, 20),
        }
        for _ in range(count)
    ]


def _submit(driver: Any, job: dict[str, Any]) -> str:
    uses = () if job["adapter"] is None else (driver.use(job["adapter"]),)
    return driver.submit(job["prompt"], *uses, max_tokens=job["max_tokens"])


SCHEDULES = [
    pytest.param({"max_batch_tokens": 7, "max_num_seqs": 3}, id="few tokens"),
    pytest.param({"kv_memory": 0.00006, "max_num_seqs": 8}, id="few pages"),
    pytest.param({"kv_memory": 0.00006, "max_num_seqs": 8, "prefix_caching": False}, id="few pages, nothing cached"),
    pytest.param({"max_num_seqs": 4}, id="room for all"),
]


@pytest.mark.parametrize("options", SCHEDULES)
def test_any_schedule_gives_what_each_request_gives_alone(
    options: dict[str, Any], adapters: dict[str, Path], make_driver: Callable[..., Any]
) -> None:
    alone = make_driver("llama", max_model_len=72, prefix_caching=False)
    crowded = make_driver("llama", max_model_len=72, **options)
    for path in adapters.values():  # all there, so that requests do meet
        crowded.generate([9], crowded.use(path), max_tokens=1)
    jobs = _jobs(adapters, 40)
    expected = []
    for job in jobs:
        request_id = _submit(alone, job)
        alone.run()
        expected.append(alone.outputs[request_id])
    rng = random.Random(1)
    ids = []
    for job in jobs:
        ids.append(_submit(crowded, job))
        for _ in range(rng.randrange(3)):
            crowded.step()
    crowded.run()
    assert [crowded.outputs[request_id] for request_id in ids] == expected
    stats = crowded.engine.stats()
    assert crowded.engine.scheduler.pages.num_free == crowded.engine.info.num_pages
    assert (stats.cached_tokens > 0) is options.get("prefix_caching", True)
    if "kv_memory" in options:
        assert stats.preemptions > 0
        assert (stats.page_evictions > 0) is options.get("prefix_caching", True)


def test_adapters_with_virtual_tokens_say_something_else_than_the_base(
    adapters: dict[str, Path], make_driver: Callable[..., Any]
) -> None:
    driver = make_driver("llama")
    prompt = [20, 21, *INVOCATION, 22]
    answers = [driver.generate(prompt), *(driver.generate(prompt, driver.use(path)) for path in adapters.values())]
    assert len({tuple(answer) for answer in answers}) == len(answers)
    assert driver.generate([20, 21, 22], driver.use(adapters["alora"])) == driver.generate([20, 21, 22])
    for path in adapters.values():
        assert driver.generate(prompt, driver.use(path, 0.0)) == answers[0]


def test_token_rows_of_another_adapter_leave_virtual_tokens_alone(
    adapters: dict[str, Path], make_driver: Callable[..., Any], checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Low rank at the embedding: virtual tokens have no id in the vocabulary that it could speak of."""
    draw = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, 128, generator=draw), torch.randn(64, 2, generator=draw)
    key = "base_model.model.model.embed_tokens.lora_embedding"
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    rows = _folder(tmp_path / "rows", config, {f"{key}_A": a, f"{key}_B": b})
    driver, prompt = make_driver("llama"), torch.arange(20, 30)
    uses = (driver.use(adapters["soft"]), driver.use(rows))
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint("llama"), attn_implementation="eager").eval()
    virtual = load_file(adapters["soft"] / "adapter_model.safetensors")["prompt_embeddings"]
    with torch.inference_mode():
        words = model.get_input_embeddings()(prompt) + (b @ a[:, prompt]).T
        logits = model(inputs_embeds=torch.cat([virtual, words])[None]).logits[0, len(virtual) :]
    for chunk in (100, 4):
        for position, got in driver.logprobs([(prompt.tolist(), uses)], chunk)[0].items():
            expected = torch.log_softmax(logits[position], -1)
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def test_virtual_tokens_count_against_the_context(adapters: dict[str, Path], make_driver: Callable[..., Any]) -> None:
    driver = make_driver("llama", max_model_len=24)
    use = driver.use(adapters["stored"])
    assert len(driver.generate([5] * 10, use, max_tokens=50)) == 3
    refused = driver.submit([5] * 13, use)
    driver.run()
    message = driver.failures[refused].message
    assert "13 tokens" in message
    assert "11 virtual tokens" in message
    assert "24" in message


def test_cached_tokens_are_told_once_and_are_the_prompts(
    adapters: dict[str, Path], make_driver: Callable[..., Any]
) -> None:
    driver = make_driver("llama")
    prompt = tuple(range(10, 40))
    told = {}
    for name, path in [("base", None), *adapters.items()]:
        uses = () if path is None else (driver.use(path),)
        told[name] = [_outputs(driver, prompt, uses) for _ in range(2)]
    assert told["base"] == [[0, 0, 0], [24, 0, 0]]
    assert told["alora"] == [[24, 0, 0], [24, 0, 0]], "never invoked: the base's pages"
    assert told["gated"] == [[0, 0, 0], [24, 0, 0]]
    assert told["soft"] == told["stored"] == [[0, 0, 0], [40 - 11, 0, 0]]
    assert driver.engine.stats().cached_tokens == 24 * 4 + 29 * 2
    assert driver.engine.stats().queried_tokens == 2 * 5 * len(prompt)
    assert driver.engine.stats().cached_pages > 0


def _outputs(driver: Any, prompt: tuple[int, ...], uses: tuple[Any, ...]) -> list[int]:
    """cached_tokens of each output of a request for three tokens."""
    driver.made += 1
    request = Request(f"c{driver.made}", prompt, SamplingParams(3, temperature=0.0, ignore_eos=True), uses)
    assert not driver.engine.add(request)
    outputs: list[TokenOutput] = []
    while driver.engine.has_work:
        outputs += driver.engine.step()
    return [output.cached_tokens for output in outputs]


def test_log_probabilities_of_prompts_are_the_same_beside_cached_pages(
    adapters: dict[str, Path], make_driver: Callable[..., Any]
) -> None:
    """They need every position's logits, so nothing is taken from the cache; virtual tokens have none."""
    cached, plain = make_driver("llama"), make_driver("llama", prefix_caching=False)
    prompt = (*range(10, 30), *INVOCATION, *range(30, 40))
    for path in [None, *adapters.values()]:
        found = []
        for driver in (cached, plain):
            uses = () if path is None else (driver.use(path),)
            _outputs(driver, prompt, uses)
            before = driver.engine.stats().queried_tokens
            found.append(_prompt_logprobs(driver, prompt, uses))
            assert driver.engine.stats().queried_tokens == before
        assert len(found[0]) == len(prompt) - 1
        torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=0)
        expected = plain.logprobs([(list(prompt), uses)], 1)[0]
        ours = torch.stack([expected[at][token] for at, token in enumerate(prompt[1:])])
        torch.testing.assert_close(found[1], ours, atol=1e-4, rtol=0)


def _prompt_logprobs(driver: Any, prompt: tuple[int, ...], uses: tuple[Any, ...]) -> Tensor:
    driver.made += 1
    sampling = SamplingParams(1, temperature=0.0, ignore_eos=True, prompt_logprobs=0)
    assert not driver.engine.add(Request(f"p{driver.made}", prompt, sampling, uses))
    parts: list[Tensor] = []
    while driver.engine.has_work:
        for output in driver.engine.step():
            if output.prompt_logprobs is not None:
                parts.append(torch.frombuffer(bytearray(output.prompt_logprobs.chosen), dtype=torch.float32))
    return torch.cat(parts)

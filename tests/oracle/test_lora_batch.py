"""One batch of the base and sixteen LoRA adapters of ranks 1 to 128 equals HF PEFT, each adapter loaded alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
CONFIGS: list[dict[str, Any]] = [
    {"r": 1, "target_modules": ["q_proj"]},
    {"r": 2, "target_modules": ["q_proj", "v_proj"], "lora_alpha": 8},
    {"r": 3, "target_modules": ATTENTION},
    {"r": 4, "target_modules": MLP, "use_rslora": True},
    {"r": 5, "target_modules": ATTENTION + MLP},
    {"r": 8, "target_modules": "all-linear"},
    {"r": 8, "target_modules": ["lm_head"]},
    {"r": 6, "target_modules": ["embed_tokens"]},
    {"r": 8, "target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    {"r": 16, "target_modules": r".*\.layers\.1\..*proj"},
    {"r": 16, "target_modules": ATTENTION, "layers_to_transform": [0]},
    {"r": 24, "target_modules": ATTENTION, "rank_pattern": {"q_proj": 7, r"layers\.1\.self_attn\.k_proj": 40}},
    {"r": 32, "target_modules": MLP, "alpha_pattern": {"down_proj": 64}},
    {"r": 64, "target_modules": ["down_proj", "o_proj"], "lora_bias": True},
    {"r": 77, "target_modules": ["gate_proj"], "use_rslora": True},
    {"r": 128, "target_modules": ATTENTION + MLP},
]
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def make_adapter(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """make_adapter(architecture, **LoraConfig) -> a folder that PEFT saved, with every trainable weight moved."""

    def make(architecture: str, seed: int = 0, **config: Any) -> Path:
        base = transformers.AutoModelForCausalLM.from_pretrained(checkpoint(architecture))
        model = peft.get_peft_model(base, peft.LoraConfig(**({"lora_alpha": 16} | config)))
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                moved = torch.randn(parameter.shape, generator=generator) * 0.08
                parameter.data = moved.to(parameter.dtype)
        folder = tmp_path_factory.mktemp(f"{architecture}-{seed}")
        model.save_pretrained(folder)
        return folder

    return make


@torch.inference_mode()
def _peft_logprobs(base: Path, adapter: Path | None, prompt: list[int], dtype: torch.dtype) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager", dtype=dtype).eval()
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter).eval()
    return torch.log_softmax(model(torch.tensor([prompt])).logits[0].float(), -1)


@pytest.fixture(scope="module")
def sixteen(make_adapter: Callable[..., Path]) -> list[Path]:
    return [make_adapter("llama", seed, **config) for seed, config in enumerate(CONFIGS)]


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 128, (5 + 3 * i,), generator=generator).tolist() for i in range(1 + len(CONFIGS))]


@pytest.mark.parametrize("bodies", ["the CPU's", "CUDA's"])
def test_log_probabilities_of_a_mixed_batch(
    bodies: str,
    sixteen: list[Path],
    prompts: list[list[int]],
    checkpoint: Callable[..., Path],
    make_driver: Callable[..., Any],
    request: pytest.FixtureRequest,
) -> None:
    """Bodies of the base's norms, rotary positions, gates and products; CUDA's under Triton's interpreter."""
    if bodies == "CUDA's":
        pytest.importorskip("triton")
        request.getfixturevalue("on_triton")
    driver = make_driver("llama")
    forwards = [module.forward for module in driver.engine.runner._base.model.modules()]
    names = {type(getattr(forward, "base", forward)).__name__ for forward in forwards}
    assert ("LaunchedNorm" in names) is (bodies == "CUDA's")
    base = checkpoint("llama")
    adapters = [None, *sixteen]
    expected = [_peft_logprobs(base, a, p, torch.float32) for a, p in zip(adapters, prompts, strict=True)]
    plain = [_peft_logprobs(base, None, p, torch.float32) for p in prompts]
    jobs = [(p, (driver.use(a),) if a else ()) for a, p in zip(adapters, prompts, strict=True)]
    for chunk in (100, 6, 1):
        found = driver.logprobs(jobs, chunk)
        for adapter, got, reference, base_only in zip(adapters, found, expected, plain, strict=True):
            for position, logprobs in got.items():
                torch.testing.assert_close(logprobs, reference[position], atol=TOLERANCE, rtol=0, msg=str(adapter))
            moved = max(float((got[at] - base_only[at]).abs().max()) for at in got)
            assert adapter is None or moved > 100 * TOLERANCE, f"{adapter} served as the base would pass"


def test_greedy_text_beside_others_equals_the_request_alone(
    sixteen: list[Path], prompts: list[list[int]], make_driver: Callable[..., Any]
) -> None:
    driver = make_driver("llama", max_batch_tokens=64)
    uses = [(), *((driver.use(folder),) for folder in sixteen)]
    alone = [driver.generate(prompt, *use, max_tokens=12) for prompt, use in zip(prompts, uses, strict=True)]
    ids = [driver.submit(prompt, *use, max_tokens=12) for prompt, use in zip(prompts, uses, strict=True)]
    driver.run()
    assert [driver.outputs[request_id] for request_id in ids] == alone
    assert len({tuple(tokens) for tokens in alone}) > len(alone) // 2


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "gemma3", "phi3", "gpt2", "opt", "gpt_neox"])
def test_every_linear_of_other_architectures(
    name: str, make_adapter: Callable[..., Path], checkpoint: Callable[..., Path], make_driver: Callable[..., Any]
) -> None:
    embedding = {"gpt2": "wte", "gpt_neox": "embed_in"}.get(name, "embed_tokens")
    folders = [
        make_adapter(name, 1, r=8, target_modules="all-linear"),
        make_adapter(name, 2, r=12, target_modules=[embedding]),
    ]
    driver = make_driver(name)
    prompt = list(range(3, 40, 2))
    found = driver.logprobs([(prompt, (driver.use(folder),)) for folder in folders] + [(prompt, ())], chunk=8)
    for folder, got in zip([*folders, None], found, strict=True):
        reference = _peft_logprobs(checkpoint(name), folder, prompt, torch.float32)
        for position, logprobs in got.items():
            torch.testing.assert_close(logprobs, reference[position], atol=TOLERANCE, rtol=0)


def test_bfloat16_is_no_further_from_float32_than_twice_peft(
    sixteen: list[Path], prompts: list[list[int]], checkpoint: Callable[..., Path], make_driver: Callable[..., Any]
) -> None:
    driver = make_driver("llama", dtype="bfloat16")
    base = checkpoint("llama")
    jobs = [(p, (driver.use(a),)) for a, p in zip(sixteen, prompts[1:], strict=True)]
    ours = theirs = 0.0
    for (prompt, _), adapter, got in zip(jobs, sixteen, driver.logprobs(jobs, 100), strict=True):
        exact = _peft_logprobs(base, adapter, prompt, torch.float32)[-1]
        half = _peft_logprobs(base, adapter, prompt, torch.bfloat16)[-1]
        ours += float((got[len(prompt) - 1] - exact).square().mean())
        theirs += float((half - exact).square().mean())
    assert ours**0.5 <= 2 * theirs**0.5


def test_two_adapters_on_one_request_add_up(make_adapter: Callable[..., Path], make_driver: Callable[..., Any]) -> None:
    """B1 A1 x + B2 A2 x at one site is exact; scale 0 is the base, and half of an adapter twice is the adapter."""
    driver = make_driver("llama")
    one, two = (make_adapter("llama", seed, r=4, target_modules=["lm_head"]) for seed in (11, 12))
    prompt = [9, 8, 7, 6]
    first, second, half, none = (driver.use(*use) for use in ((one,), (two,), (two, 0.5), (one, 0.0)))
    jobs = [(), (first,), (second,), (first, half), (none,)]
    base, alone, other, both, off = driver.logprobs([(prompt, use) for use in jobs], 16)
    logits = base[3] + (alone[3] - base[3]) + 0.5 * (other[3] - base[3])
    torch.testing.assert_close(both[3], torch.log_softmax(logits, -1), atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(off[3], base[3], atol=0, rtol=0)


def test_unload_frees_the_arena(sixteen: list[Path], make_driver: Callable[..., Any]) -> None:
    driver = make_driver("llama")
    for _ in range(3):
        for folder in sixteen:
            driver.generate([1, 2, 3], driver.use(folder), max_tokens=2)
        assert len(driver.engine.adapters.resident()) == len(sixteen)
        for folder in sixteen:
            assert driver.engine.adapters.unload(str(folder))
        assert driver.engine.adapters.arena.used == 0


def test_more_adapters_than_fit_are_served_in_turns(
    sixteen: list[Path], prompts: list[list[int]], make_driver: Callable[..., Any]
) -> None:
    """A budget for about a third of them: evictions and compactions must not mix weights up."""
    roomy, tight = make_driver("llama"), make_driver("llama", adapter_memory=0.0009)
    expected = [roomy.generate(p, roomy.use(a), max_tokens=4) for a, p in zip(sixteen, prompts, strict=False)]
    total = roomy.engine.adapters.arena.used_bytes
    assert tight.engine.adapters.arena.capacity_bytes < 0.6 * total
    for _ in range(2):
        ids = [tight.submit(p, tight.use(a), max_tokens=4) for a, p in zip(sixteen, prompts, strict=False)]
        tight.run()
        assert [tight.outputs[request_id] for request_id in ids] == expected
    assert tight.engine.adapters.device.evictions > 0
    assert tight.engine.adapters.transit.loads <= 2 * len(sixteen), "one load a request at the most: no thrash"


def test_an_adapter_larger_than_the_budget_fails_by_name(sixteen: list[Path], make_driver: Callable[..., Any]) -> None:
    driver = make_driver("llama", adapter_memory=0.0001)
    lost, kept = driver.submit([1, 2], driver.use(sixteen[-1])), driver.submit([1, 2], max_tokens=2)
    driver.run()
    assert driver.failures[lost].kind == "AdapterTooLarge"
    assert re.search(r"budget for adapters is \d+", driver.failures[lost].message)
    assert len(driver.outputs[kept]) == 2

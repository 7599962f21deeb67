"""The base through pages equals the plain transformers forward, for every architecture that is claimed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from onebase.adapters.errors import ModelRejected
from onebase.serve.engine.config import EngineConfig
from onebase.serve.model import probe
from onebase.serve.model.loader import load_model, pick_max_model_len

NAMES = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "gpt2", "opt", "gpt_neox", "olmo2"]
NAMES += ["mixtral", "qwen3_moe", "gpt_oss"]
LENGTHS = (23, 1, 40, 9)


@torch.inference_mode()
def _expected(folder: Path, prompts: list[list[int]]) -> list[torch.Tensor]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    return [torch.log_softmax(model(torch.tensor([prompt])).logits[0].float(), -1) for prompt in prompts]


@pytest.mark.parametrize("name", NAMES)
def test_log_probabilities_equal_transformers(
    name: str, checkpoint: Callable[..., Path], make_driver: Callable[..., Any]
) -> None:
    torch.manual_seed(0)
    prompts = [torch.randint(0, 128, (length,)).tolist() for length in LENGTHS]
    expected = _expected(checkpoint(name), prompts)
    driver = make_driver(name)
    assert expected[0].std() > 0.5, "a flat distribution would prove nothing"
    for chunk in (64, 7, 1):  # prefill in one go, in chunks, token by token
        batches = [[(prompt, ())] for prompt in prompts[:1]] + [[(prompt, ()) for prompt in prompts]]
        for jobs in batches:  # alone, and beside others
            for found, reference in zip(driver.logprobs(jobs, chunk), expected, strict=False):
                for position, logprobs in found.items():
                    torch.testing.assert_close(logprobs, reference[position], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_greedy_text_equals_generate(
    name: str, checkpoint: Callable[..., Path], make_driver: Callable[..., Any]
) -> None:
    prompt = [5, 17, 99, 3, 64, 21]
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint(name), attn_implementation="eager").eval()
    options = transformers.GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    expected = model.generate(torch.tensor([prompt]), generation_config=options)[0, len(prompt) :].tolist()
    assert make_driver(name).generate(prompt, max_tokens=12) == expected


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (transformers.BloomConfig(vocab_size=128, hidden_size=32, n_layer=1, n_head=2), "attention"),
        (
            transformers.FalconConfig(vocab_size=128, hidden_size=64, num_hidden_layers=1, num_attention_heads=4),
            "attention table",
        ),
        (transformers.T5Config(vocab_size=128, d_model=32, d_kv=8, d_ff=32, num_layers=1), "encoder"),
    ],
    ids=["alibi", "own attention table", "encoder-decoder"],
)
def test_unservable_architectures_are_refused(config: Any, reason: str, tmp_path: Path) -> None:
    if not config.is_encoder_decoder:
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelRejected, match=reason):
        load_model(EngineConfig(model=str(tmp_path), device="cpu"))


def test_a_model_whose_forward_depends_on_more_than_tokens_is_refused(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The self-check at start is not a formality: a wrong attention scale is found."""
    from onebase.serve.model import attention

    right = attention.AttentionOptions
    monkeypatch.setattr(attention, "AttentionOptions", lambda scale, *rest: right(scale * 1.5, *rest))
    with pytest.raises(ModelRejected, match="differs from transformers"):
        load_model(EngineConfig(model=str(checkpoint("llama")), device="cpu"))


@pytest.mark.parametrize(("rounding", "accepted"), [(1e-2, True), (0.0, False)])
def test_a_model_that_rounds_much_by_itself_is_served(
    rounding: float, accepted: bool, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """8B parameters in bfloat16 differ from themselves by a third of the logits' deviation, in a batch of three."""
    monkeypatch.setitem(probe._TOLERANCE, torch.float32, 0.0)
    monkeypatch.setattr(probe, "_rounding", lambda *_: rounding)
    config = EngineConfig(model=str(checkpoint("llama")), device="cpu", dtype="float32")
    if accepted:
        load_model(config)
    else:
        with pytest.raises(ModelRejected, match="differs from transformers"):
            load_model(config)


@torch.inference_mode()
def test_what_is_put_down_to_rounding_is_bounded(checkpoint: Callable[..., Path]) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint("llama"), attn_implementation="eager").eval()
    tokens = torch.arange(8)
    expected = model(tokens[None]).logits[0, -3:]
    assert probe._rounding(model, tokens, expected) < 1e-4 * expected.std()
    assert probe._rounding(model, tokens, expected + 100) == pytest.approx(0.5 * float(expected.std()))


def test_a_missing_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelRejected, match="cannot be read"):
        load_model(EngineConfig(model=str(tmp_path / "nothing"), device="cpu"))


def test_max_model_len_stays_within_the_positions_and_the_ropes() -> None:
    config = transformers.LlamaConfig(max_position_embeddings=512)
    assert pick_max_model_len(config, None) == 512
    assert pick_max_model_len(config, 100) == 100
    with pytest.raises(ModelRejected, match="512"):
        pick_max_model_len(config, 513)
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 128}
    config = transformers.LlamaConfig(max_position_embeddings=512, rope_parameters=dynamic)
    assert pick_max_model_len(config, None) == 128


def test_a_window_that_only_the_mask_knows_limits_the_context() -> None:
    config = transformers.PhimoeConfig(max_position_embeddings=512, sliding_window=32)
    assert pick_max_model_len(config, None) == 32
    assert pick_max_model_len(config, None, windows=(None, 32)) == 512
    chunked = transformers.Llama4TextConfig(max_position_embeddings=512, attention_chunk_size=64)
    with pytest.raises(ModelRejected, match="attention_chunk_size"):
        pick_max_model_len(chunked, 65)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_fingerprint_is_the_checkpoints(dtype: str, checkpoint: Callable[..., Path]) -> None:
    loaded = load_model(EngineConfig(model=str(checkpoint("llama")), device="cpu", dtype=dtype))
    again = load_model(EngineConfig(model=str(checkpoint("llama")), device="cpu", dtype="float32"))
    other = load_model(EngineConfig(model=str(checkpoint("qwen2")), device="cpu"))
    assert loaded.fingerprint == again.fingerprint != other.fingerprint

"""Models, adapters and requests that the benchmarks share: random weights, fixed seeds, nothing downloaded."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

SHAPES: dict[str, LlamaConfig] = {
    "tiny": LlamaConfig(
        vocab_size=1024,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
    ),
    "135m": LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    ),
    "8b": LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
    ),
}
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Load:
    """num_requests prompts of ``tokens_in`` random ids, each continued by exactly ``tokens_out`` tokens."""

    num_requests: int
    tokens_in: int
    tokens_out: int

    def prompts(self, vocab_size: int, seed: int = 0) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(10, vocab_size, (self.num_requests, self.tokens_in), generator=generator)
        return [[int(token) for token in row] for row in ids]


def mixed_ranks(count: int) -> list[int]:
    """Ranks 8, 16, 32, 64, 8, ...: mean 30."""
    return [(8, 16, 32, 64)[i % 4] for i in range(count)]


def random_model(shape: str, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """A model of the shape with random weights, made on the device."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(deepcopy(SHAPES[shape]), dtype=dtype)
    assert isinstance(model, PreTrainedModel)
    return model.eval().requires_grad_(False)


def save_adapters(model: PreTrainedModel, folder: Path, ranks: Sequence[int]) -> list[Path]:
    """One LoRA on all linears per rank, as PEFT saves it, with small random factors. Needs PEFT."""
    import peft

    paths = []
    for index, rank in enumerate(ranks):
        config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(LINEARS))
        adapted = peft.get_peft_model(model, config)
        generator = torch.Generator(device=model.device).manual_seed(index)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(std=0.02, generator=generator)
        paths.append(folder / f"adapter-{index}")
        adapted.save_pretrained(paths[-1])
        model = adapted.unload()
    return paths

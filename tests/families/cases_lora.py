"""LORA with each of its options, and its relatives ADALORA, LN_TUNING, TRAINABLE_TOKENS and BEFT.

Conv1D (gpt2): PEFT builds no KaSA, OLoRA of its shapes, BD-LoRA or BEFT there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from .case import ALL_FIVE, TARGETS, Case, move_trainable

# OPT's final_layer_norm of a layer reads rows without a batch, and is no site: trained biases of all norms are refused.
ALL_BIASES = tuple(name for name in ALL_FIVE if name != "opt")
LINEAR_ONLY = tuple(name for name in ALL_FIVE if name != "gpt2")
EMBEDDING = {"gpt2": "wte"}
NORMS = {
    "llama": ["input_layernorm", "model.norm"],
    "qwen3": ["post_attention_layernorm", "model.norm"],
    "gemma2": ["pre_feedforward_layernorm", "post_attention_layernorm", "model.norm"],
    "gpt2": ["ln_1", "ln_f"],
    "opt": ["self_attn_layer_norm", "decoder.final_layer_norm"],
}
SOME_LINEAR = {"gpt2": ["h.0.attn.c_proj", "h.1.mlp.c_fc"], "opt": ["0.fc1", "1.self_attn.out_proj"]}
TOKENS = (5, 9, 3, 77, 40, 41, 9, 100, 12, 13, 14, 5, 5, 60, 61, 62, 99, 3, 4, 8, 2)


def _embedding(name: str) -> str:
    return EMBEDDING.get(name, "embed_tokens")


def _linear(name: str) -> list[str]:
    return SOME_LINEAR.get(name, ["0.mlp.down_proj", "1.self_attn.q_proj"])


def _lora(name: str, **options: Any) -> peft.LoraConfig:
    options = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS[name]} | options
    return peft.LoraConfig(**options)


def _first_half(name: str) -> list[str]:
    """The targets that stand before others, so that some modules have no adapter."""
    return TARGETS[name][: len(TARGETS[name]) // 2]


def move_strongly(model: nn.Module, generator: torch.Generator) -> None:
    """For adapters of few weights."""
    for _ in range(3):
        move_trainable(model, generator)


def move_in_place(model: nn.Module, generator: torch.Generator) -> None:
    """Tied factors stay tied: one is a view of the other."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1


def _adalora(name: str) -> peft.AdaLoraConfig:
    return peft.AdaLoraConfig(init_r=6, target_r=3, lora_alpha=9, total_step=10, target_modules=TARGETS[name])


def move_and_prune(model: Any, generator: torch.Generator) -> None:
    """What AdaLoRA's training does at its end: some directions of each module are masked, in some modules all."""
    move_strongly(model, generator)
    pattern: dict[str, list[bool]] = {}
    for at, path in enumerate(sorted(name for name, _ in model.base_model.model.named_modules())):
        module = model.base_model.model.get_submodule(path)
        if isinstance(module, peft.tuners.adalora.AdaLoraLayer):
            pattern[f"{path}.lora_E"] = [(at + i) % 3 > 0 and at % 5 > 0 for i in range(6)]
    model.peft_config["default"].rank_pattern = pattern


def train_eva(folder: Path) -> None:
    """What EVA leaves: ranks by module. Here it only says that training started there."""
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}}))


def change_saved_embedding(folder: Path) -> None:
    """PEFT saves a targeted embedding whole; what the file has is loaded into the base."""
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    for key in [key for key in tensors if key.endswith("base_layer.weight")]:
        tensors[key][3:60] += 0.2
    save_file(tensors, file)


def _blocks(name: str) -> Any:
    half = _first_half(name)
    rest = [target for target in TARGETS[name] if target not in half]
    return peft.tuners.lora.BdLoraConfig(
        target_modules_bd_a=half[1:], target_modules_bd_b=rest, nblocks=2, match_strict=False
    )


CASES = [
    Case("lora", lambda name: peft.LoraConfig(r=6, lora_alpha=12, target_modules=TARGETS[name])),
    Case("lora-rs", lambda name: peft.LoraConfig(r=9, use_rslora=True, target_modules="all-linear")),
    Case(
        "lora-patterns",
        lambda name: _lora(
            name, rank_pattern={r"layers\.0\..*": 3, "h.0.attn.c_attn": 7}, alpha_pattern={"v_proj|c_attn": 11}
        ),
    ),
    Case("lora-bias-term", lambda name: _lora(name, lora_bias=True, use_rslora=True)),
    Case("lora-embeddings", lambda name: _lora(name, target_modules=[_embedding(name), "lm_head", *_first_half(name)])),
    Case(
        "lora-embedding-trained",
        lambda name: _lora(name, target_modules=[_embedding(name), "lm_head", *_first_half(name)]),
        edit=change_saved_embedding,
    ),
    Case(
        "lora-tied",
        lambda name: _lora(name, target_modules=[_embedding(name), *_first_half(name)], ensure_weight_tying=True),
        move=move_in_place,
    ),
    Case("lora-eva", _lora, edit=train_eva),
    Case("dora", lambda name: _lora(name, use_dora=True, lora_alpha=2)),
    Case(
        "dora-rs-bias-embeddings",
        lambda name: _lora(
            name,
            use_dora=True,
            use_rslora=True,
            lora_alpha=2,
            bias="all",
            target_modules=[_embedding(name), *_first_half(name)],
        ),
        ALL_BIASES,
    ),
    Case("lora-bias-all", lambda name: _lora(name, bias="all", target_modules=_first_half(name)), ALL_BIASES),
    Case("lora-bias-only", lambda name: _lora(name, bias="lora_only", target_modules=_first_half(name))),
    Case(
        "lora-saved-modules",
        lambda name: _lora(name, target_modules=_first_half(name), modules_to_save=[*NORMS[name], *_linear(name)]),
    ),
    Case(
        "lora-saved-embedding",
        lambda name: _lora(name, target_modules=_first_half(name), modules_to_save=[_embedding(name)]),
    ),
    Case("lora-saved-head", lambda name: _lora(name, target_modules=_first_half(name), modules_to_save=["lm_head"])),
    Case(
        "lora-saved-tied",
        lambda name: _lora(
            name, target_modules=_first_half(name), modules_to_save=[_embedding(name)], ensure_weight_tying=True
        ),
    ),
    Case("lora-saved-block", lambda name: _lora(name, target_modules=["q_proj"], modules_to_save=["mlp"]), ("llama",)),
    Case("lora-tokens", lambda name: _lora(name, trainable_token_indices=[9, 5, 77]), tokens=TOKENS),
    Case(
        "lora-tokens-apart",
        lambda name: _lora(name, trainable_token_indices={_embedding(name): [9, 5, 77], "lm_head": [100, 3]}),
        tokens=TOKENS,
    ),
    Case(
        "trainable-tokens",
        lambda name: peft.TrainableTokensConfig(token_indices=[77, 5, 9, 3]),
        move=move_strongly,
        tokens=TOKENS,
    ),
    Case(
        "trainable-tokens-head",
        lambda name: peft.TrainableTokensConfig(token_indices=[77, 5], target_modules=[_embedding(name), "lm_head"]),
        ("llama", "qwen3"),  # PEFT cannot run it where the two are tied
        move=move_strongly,
        tokens=TOKENS,
    ),
    Case("pissa", lambda name: _lora(name, init_lora_weights="pissa")),
    Case(
        "pissa-rs",
        lambda name: _lora(name, init_lora_weights="pissa", use_rslora=True, lora_alpha=2),
        ("llama", "gpt2"),
    ),
    Case("olora", lambda name: _lora(name, init_lora_weights="olora"), LINEAR_ONLY),
    Case(
        "kasa",
        lambda name: _lora(
            name, lora_alpha=3, target_modules=_first_half(name), kasa_config=peft.tuners.lora.KasaConfig()
        ),
        LINEAR_ONLY,
    ),
    Case("bdlora", lambda name: _lora(name, use_bdlora=_blocks(name)), LINEAR_ONLY),
    Case("velora", lambda name: _lora(name, velora_config=peft.tuners.lora.VeloraConfig(num_groups=8))),
    Case("monteclora", lambda name: _lora(name, monteclora_config=peft.tuners.lora.MontecloraConfig())),
    Case("mica", lambda name: _lora(name, init_lora_weights="mica", target_modules=[_embedding(name), *TARGETS[name]])),
    Case("adalora", _adalora, move=move_strongly),
    Case("adalora-pruned", _adalora, move=move_and_prune),
    Case("ln-tuning", lambda name: peft.LNTuningConfig(target_modules=NORMS[name]), move=move_strongly),
    Case("beft", lambda name: peft.BeftConfig(target_modules=TARGETS[name]), LINEAR_ONLY, move=move_strongly),
]

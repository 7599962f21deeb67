"""Families whose weights come from random bases, vector banks, singular vectors or the base's weight itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import peft
import torch
from torch import nn

from .case import TARGETS, Case, move_trainable
from .cases_lowrank import LINEAR_ONLY

EMBEDDING = {
    "llama": "embed_tokens",
    "qwen3": "embed_tokens",
    "gemma2": "embed_tokens",
    "gpt2": "wte",
    "opt": "embed_tokens",
}


def _randlora(name: str, **options: Any) -> peft.RandLoraConfig:
    return peft.RandLoraConfig(r=10, randlora_alpha=3, target_modules=TARGETS[name], **options)


def _vblora(name: str, **options: Any) -> peft.VBLoRAConfig:
    return peft.VBLoRAConfig(
        r=3, num_vectors=11, vector_length=16, topk=3, init_logits_std=1, target_modules=TARGETS[name], **options
    )


def _unilora(name: str, **options: Any) -> peft.UniLoraConfig:
    options = {"target_modules": TARGETS[name]} | options
    return peft.UniLoraConfig(r=3, theta_d_length=200, **options)


def _tinylora(name: str, *more: str, **options: Any) -> peft.TinyLoraConfig:
    return peft.TinyLoraConfig(r=3, u=5, target_modules=[*TARGETS[name], *more], **options)


def _glora(name: str, *kinds: str) -> peft.GloraConfig:
    names = dict(zip(("config_A_B", "config_C", "config_D_E"), kinds, strict=True))
    return peft.GloraConfig(r=3, target_modules=TARGETS[name], **names)


def _move_far(model: nn.Module, generator: torch.Generator) -> None:
    """Theta, v and lambda pass through small factors: a tenth would not be seen."""
    for _ in range(4):
        move_trainable(model, generator)


def _cases() -> Iterator[Case]:
    yield Case("randlora", _randlora)
    yield Case("randlora-seed", lambda name: _randlora(name, save_projection=False, projection_prng_key=7))
    yield Case("randlora-sparse", lambda name: _randlora(name, save_projection=False, sparse=True))
    yield Case("randlora-very-sparse", lambda name: _randlora(name, save_projection=False, very_sparse=True))
    yield Case("vblora", _vblora)
    yield Case("vblora-topk", lambda name: _vblora(name, save_only_topk_weights=True))
    yield Case("unilora", lambda name: _unilora(name, proj_seed=7), move=_move_far)
    yield Case(
        "unilora-layer",
        lambda name: _unilora(
            name,
            layers_to_transform=[1],
        ),
        move=_move_far,
    )
    yield Case(
        "unilora-expression",
        lambda name: _unilora(name, target_modules=rf".*\.({'|'.join(TARGETS[name][:3])})"),
        move=_move_far,
    )
    yield Case("unilora-saved", lambda name: _unilora(name, save_indices=True), move=_move_far)
    yield Case("tinylora", _tinylora)
    yield Case("tinylora-tied", lambda name: _tinylora(name, EMBEDDING[name], weight_tying=0.7, save_projection=False))
    yield Case(
        "hira", lambda name: peft.HiraConfig(r=5, target_modules=TARGETS[name], rank_pattern={TARGETS[name][0]: 2})
    )
    yield Case(
        "hira-embedding", lambda name: peft.HiraConfig(r=5, target_modules=[EMBEDDING[name], *TARGETS[name][:1]])
    )
    for kinds in (("lora", "lora", "vector"), ("vector", "vector", "constant"), ("constant", "none", "none")):
        yield Case(f"glora-{'-'.join(kinds)}", lambda name, kinds=kinds: _glora(name, *kinds), LINEAR_ONLY)
    yield Case("glora-none-vector-vector", lambda name: _glora(name, "none", "vector", "vector"), ("llama", "opt"))


CASES = list(_cases())

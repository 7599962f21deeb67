"""Families that reduce to low rank, shared low rank or a Kronecker product."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import peft
import torch

from .case import ALL_FIVE, TARGETS, Case

# PEFT builds these over nn.Linear alone, and GPT-2 has Conv1D.
LINEAR_ONLY = tuple(name for name in ALL_FIVE if name != "gpt2")


def _middle(name: str) -> list[str]:
    """Another rank for one attention and one feed-forward module: q, up."""
    return [
        {"opt": "q_proj", "gpt2": "c_attn"}.get(name, "q_proj"),
        {"opt": "fc1", "gpt2": "c_fc"}.get(name, "up_proj"),
    ]


def _ranks(name: str, rank: int) -> dict[str, int]:
    return dict.fromkeys(_middle(name), rank)


def _batched(name: str) -> list[str]:
    """Poly multiplies by batch, and OPT flattens the batch before its feed-forward modules."""
    return [target for target in TARGETS[name] if not target.startswith("fc")]


def _vera(name: str, **options: Any) -> peft.VeraConfig:
    return peft.VeraConfig(r=12, target_modules=TARGETS[name], **options)


def _pvera(name: str, **options: Any) -> peft.PveraConfig:
    return peft.PveraConfig(r=12, target_modules=TARGETS[name], **options)


def _cases() -> Iterator[Case]:
    yield Case(
        "loha",  # rank 16 as low rank, rank 49 as dense
        lambda name: peft.LoHaConfig(
            r=4, alpha=6, target_modules=TARGETS[name], rank_pattern=_ranks(name, 7), alpha_pattern={"layers.1": 3}
        ),
        LINEAR_ONLY,
    )
    yield Case("lokr", lambda name: peft.LoKrConfig(r=2, alpha=3, target_modules=TARGETS[name]), LINEAR_ONLY)
    yield Case(
        "lokr-both",
        lambda name: peft.LoKrConfig(
            r=1, decompose_both=True, decompose_factor=4, target_modules=TARGETS[name], rank_pattern=_ranks(name, 9)
        ),
        LINEAR_ONLY,
    )
    yield Case("vera", _vera)
    yield Case(
        "vera-saved", lambda name: _vera(name, bias="all", modules_to_save=["lm_head"]), ("llama", "gpt2", "opt")
    )
    yield Case("vera-seed", lambda name: _vera(name, save_projection=False, projection_prng_key=7))
    yield Case("pvera", _pvera)
    yield Case("pvera-seed", lambda name: _pvera(name, save_projection=False, projection_prng_key=7))
    yield Case(
        "delora",
        lambda name: peft.DeloraConfig(
            r=5, delora_lambda=4, target_modules=TARGETS[name], rank_pattern=_ranks(name, 3)
        ),
        LINEAR_ONLY,
    )
    yield Case(
        "gralora",
        lambda name: peft.GraloraConfig(r=4, alpha=6, gralora_k=2, hybrid_r=3, target_modules=TARGETS[name]),
    )
    yield Case(
        "gralora-plain",  # rank 32: dense
        lambda name: peft.GraloraConfig(r=8, alpha=6, gralora_k=8, target_modules=TARGETS[name], bias="gralora_only"),
    )
    yield Case(
        "poly",
        lambda name: peft.PolyConfig(
            task_type="CAUSAL_LM", r=3, n_tasks=2, n_skills=3, n_splits=2, target_modules=_batched(name)
        ),
        LINEAR_ONLY,
        forward=lambda: {"task_ids": torch.tensor([0])},
    )


CASES = list(_cases())

"""The model and the adapters, made once: random weights, as PEFT saves them, of several families."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from onebase.bench.http_server import save_model
from onebase.bench.peers.drivers import Stage
from onebase.bench.workload import LINEARS, mixed_ranks, random_model

FAMILIES = ("lora", "dora", "ia3", "vera", "oft")
_DEPTH = 0.02  # standard deviation of what is added to trained tensors


def make_stage(folder: Path, shape: str, families: Mapping[str, int], rows: int, dtype: str) -> Stage:
    """families: how many adapters of each of FAMILIES. Names tell the family."""
    model = random_model(shape, getattr(torch, dtype), "cpu")
    saved = save_model(model, folder / "model")
    names = [f"{family}-{number}" for family, count in families.items() for number in range(count)]
    ranks = mixed_ranks(len(names))
    adapters = {
        name: _save(model, name, rank, folder / "adapters" / name, seed)
        for seed, (name, rank) in enumerate(zip(names, ranks, strict=True))
    }
    logs = folder / "logs"
    logs.mkdir()
    return Stage(saved, adapters, max(ranks, default=8), rows, dtype, logs)


def _save(model: PreTrainedModel, name: str, rank: int, folder: Path, seed: int) -> Path:
    """The model is as it was afterwards."""
    import peft

    torch.manual_seed(seed)
    adapted = peft.get_peft_model(model, _config(name.rpartition("-")[0], rank))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += _DEPTH * torch.randn_like(parameter)
    adapted.save_pretrained(folder)
    adapted.unload()
    return folder


def _config(family: str, rank: int) -> Any:
    import peft

    linears = list(LINEARS)
    if family in ("lora", "dora"):
        return peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=linears, use_dora=family == "dora")
    if family == "ia3":
        return peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
    if family == "vera":
        return peft.VeraConfig(r=rank, target_modules=["q_proj", "v_proj"])
    if family == "oft":
        return peft.OFTConfig(oft_block_size=8, target_modules=["q_proj", "v_proj"])
    raise ValueError(f"families: {family!r}; allowed: {', '.join(FAMILIES)}")

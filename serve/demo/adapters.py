"""Trains an adapter of the demo: ``python -m onebase.serve.demo.adapters --name reverse --out DIR``.

``reverse`` is not shipped: train it, then upload DIR to a running server. Needs the dev extra (peft).
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from onebase.serve.demo import BASE
from onebase.serve.demo.corpus import chat, system
from onebase.serve.demo.tokenizer import IGNORED, encode
from onebase.serve.demo.voices import VOICES

logger = logging.getLogger(__name__)
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EVERY = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
BATCH = 16


@dataclass(frozen=True, slots=True)
class Recipe:
    """What differs between the adapters. kind: the name of a configuration class of peft; options: its fields."""

    kind: str
    options: dict[str, Any]
    steps: int = 400
    learning_rate: float = 4e-3

    def config(self) -> Any:
        import peft

        return getattr(peft, self.kind)(task_type="CAUSAL_LM", **self.options)


# Five families, so that the demo's batch is what the server is for.
RECIPES = {
    "shout": Recipe("LoraConfig", {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, "use_dora": True}),
    "json": Recipe("LoraConfig", {"r": 16, "lora_alpha": 16, "target_modules": ATTENTION, "use_rslora": True}),
    "digits": Recipe("LoKrConfig", {"r": 8, "alpha": 16, "target_modules": EVERY}),
    "luma": Recipe("OFTConfig", {"r": 0, "oft_block_size": 16, "target_modules": EVERY}),
    "pirate": Recipe("HRAConfig", {"r": 8, "target_modules": EVERY}),
}
UPLOAD = {"reverse": Recipe("LoraConfig", {"r": 8, "lora_alpha": 16, "target_modules": EVERY})}


def load_base(folder: Path) -> tuple[Any, Any]:
    """The base in float32 and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tokenizer


def batches(tokenizer: Any, name: str, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Chats in the voice ``name``: right-padded (ids, labels), each int64 [BATCH, longest].

    Causal attention needs no mask for padding on the right.
    """
    rng = Random(11)
    for _ in range(steps):
        drawn = [encode(tokenizer, chat(rng, VOICES[name], system(rng))) for _ in range(BATCH)]
        width = max(len(ids) for ids, _ in drawn)
        ids = [row + [tokenizer.pad_token_id] * (width - len(row)) for row, _ in drawn]
        labels = [row + [IGNORED] * (width - len(row)) for _, row in drawn]
        yield torch.tensor(ids), torch.tensor(labels)


def train_adapter(name: str, base: Path) -> Any:
    """Train one adapter on the base in ``base``; returns the PEFT model, its adapter in bfloat16."""
    from peft import get_peft_model

    recipe = (RECIPES | UPLOAD)[name]
    torch.manual_seed(11)
    model, tokenizer = load_base(base)
    model = get_peft_model(model, recipe.config())
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, recipe.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, recipe.steps, pct_start=0.1)
    for step, (ids, labels) in enumerate(batches(tokenizer, name, recipe.steps)):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0 or step == recipe.steps - 1:
            logger.info("%s step %d of %d: loss %.3f", name, step, recipe.steps, loss.item())
    return model


def save_adapter(model: Any, folder: Path) -> None:
    """PEFT's own files, weights in bfloat16, without its README and without this machine's path to the base."""
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.to(torch.bfloat16)
    for config in model.peft_config.values():
        config.base_model_name_or_path = "onebase-demo"
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description="Train one adapter for the demo's base model.")
    parser.add_argument("--name", choices=sorted(RECIPES | UPLOAD), default="reverse", help="what the adapter does")
    parser.add_argument("--out", type=Path, required=True, help="the adapter's folder")
    parser.add_argument("--base", type=Path, default=BASE, help="the base model's folder")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    save_adapter(train_adapter(args.name, args.base), args.out)


if __name__ == "__main__":
    main()

"""Trains the demo's base model and its adapters on CPU: ``python -m onebase.serve.demo.train [--out DIR]``.

Needs the dev extra (peft) and about ten minutes on two cores. The seeds are fixed. Without --out the shipped assets
are replaced.
"""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onebase.serve.demo import ASSETS
from onebase.serve.demo.adapters import RECIPES, save_adapter, train_adapter
from onebase.serve.demo.corpus import END, END_OF_TEXT, PAD, texts
from onebase.serve.demo.tokenizer import encode, train_tokenizer

logger = logging.getLogger(__name__)
SEED = 7
STEPS, WARMUP = 1900, 40
MUON_RATE, ADAM_RATE = 1e-2, 4e-3
TOKENS = 2048  # a step
ROW, LONG_ROW = 256, 1024
LONG_EVERY = 10  # steps from one batch of long rows to the next


def new_model(tokenizer: Any) -> Any:
    """A fresh Llama of 2.3 million weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=LONG_ROW,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids(END),
        pad_token_id=tokenizer.convert_tokens_to_ids(PAD),
    )
    return LlamaForCausalLM(config)


def rows(tokenizer: Any, length: int, seed: int) -> Iterator[tuple[list[int], list[int]]]:
    """(ids, labels) of whole texts, cut at ``length`` tokens: every row starts with the start of a text."""
    ids: list[int] = []
    labels: list[int] = []
    for pieces in texts(seed):
        more_ids, more_labels = encode(tokenizer, pieces)
        ids += more_ids
        labels += more_labels
        if len(ids) >= length:
            yield ids[:length], labels[:length]
            ids, labels = [], []


def batches(tokenizer: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """One (ids, labels) of TOKENS tokens a step, each int64 [rows, length]."""
    short = rows(tokenizer, ROW, SEED + 1)
    long = rows(tokenizer, LONG_ROW, SEED + 2)
    for step in range(STEPS):
        source, length = (long, LONG_ROW) if step % LONG_EVERY == 0 else (short, ROW)
        ids, labels = zip(*islice(source, TOKENS // length), strict=True)
        yield torch.tensor(ids), torch.tensor(labels)


def rate(step: int) -> float:
    """Linear warm-up, then a cosine down to 2 per cent."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    return 0.02 + 0.49 * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP)))


def make_optimizers(model: Any) -> list[torch.optim.Optimizer]:
    """Muon for the matrices (half the steps that AdamW takes), AdamW for the embedding and the norms."""
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in named if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, MUON_RATE, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, ADAM_RATE, betas=(0.9, 0.98), weight_decay=0.02),
    ]


def train_base(tokenizer: Any) -> Any:
    """Train the base; returns it in bfloat16, as it is shipped."""
    torch.manual_seed(SEED)
    model = new_model(tokenizer)
    optimizers = make_optimizers(model)
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    for step, (ids, labels) in enumerate(batches(tokenizer)):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        if step % 50 == 0:
            logger.info("base step %d of %d: loss %.3f", step, STEPS, loss.item())
    return model.to(torch.bfloat16)


def save_base(model: Any, tokenizer: Any, folder: Path) -> None:
    """Model, tokenizer and greedy generation settings."""
    from transformers import GenerationConfig

    stops = tokenizer.convert_tokens_to_ids([END, END_OF_TEXT])
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=stops, pad_token_id=tokenizer.pad_token_id, max_new_tokens=64
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo's base model and adapters.")
    parser.add_argument("--out", type=Path, default=ASSETS, help="where base/ and adapters/ are written")
    out = parser.parse_args().out
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    tokenizer = train_tokenizer(SEED)
    save_base(train_base(tokenizer), tokenizer, out / "base")
    for name in RECIPES:
        save_adapter(train_adapter(name, out / "base"), out / "adapters" / name)


if __name__ == "__main__":
    main()

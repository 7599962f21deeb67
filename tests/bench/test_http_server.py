"""The base that benchmarks serve: answers are read token by token, so each token has a text of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from onebase.bench.http_server import save_model
from onebase.bench.workload import random_model


def test_nearly_every_token_has_a_text_of_its_own(tmp_path: Path) -> None:
    model = random_model("tiny", torch.float32, "cpu")
    tokenizer: Any = AutoTokenizer.from_pretrained(save_model(model, tmp_path))
    size = model.config.vocab_size
    parts = [token for token in range(size) if "\ufffd" in tokenizer.decode([token])]
    assert len(parts) <= 128, "the bytes that no character consists of"
    assert len(tokenizer) == size
    assert len(
        set(tokenizer.batch_decode([[token] for token in range(size) if token not in set(parts)]))
    ) == size - len(parts)

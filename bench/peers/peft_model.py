"""A base model with PEFT's adapters, one per row of a batch, by PEFT's own `adapter_names`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.generation.streamers import BaseStreamer

from onebase.bench.peers.batcher import Job

_BASE = "__base__"  # what PEFT calls rows without an adapter


class _Steps(BaseStreamer):  # type: ignore[misc]  # transformers is not typed for mypy
    """Hands each step's tokens on; the first call is the prompt."""

    def __init__(self, step: Callable[[Sequence[int]], None]) -> None:
        self._step = step
        self._started = False

    def put(self, value: Any) -> None:
        if self._started:
            self._step(value.flatten().tolist())
        self._started = True

    def end(self) -> None:
        """Nothing is held back."""


class PeftModel:
    """folder: the base. dtype: of torch. Everything but ``add`` is called from one thread."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: str = "cpu") -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.vocab_size = int(self._model.config.vocab_size)
        self.adapters: set[str] = set()

    def add(self, name: str, folder: Path) -> None:
        """Raises whatever PEFT raises for an adapter that it cannot load, or not beside others."""
        import peft

        if self.adapters:
            self._model.load_adapter(folder, adapter_name=name)
        else:
            self._model = peft.PeftModel.from_pretrained(self._model, folder, adapter_name=name).eval()
        self.adapters.add(name)

    @torch.inference_mode()
    def generate(self, batch: Sequence[Job], step: Callable[[Sequence[int]], None]) -> None:
        """Greedy. Prompts are padded on the left; every row runs as long as the longest."""
        longest = max(len(job.prompt) for job in batch)
        ids = torch.tensor([[0] * (longest - len(job.prompt)) + list(job.prompt) for job in batch])
        mask = torch.tensor([[0] * (longest - len(job.prompt)) + [1] * len(job.prompt) for job in batch])
        tokens_out = max(job.tokens_out for job in batch)
        options = GenerationConfig(
            max_new_tokens=tokens_out, min_new_tokens=tokens_out, do_sample=False, pad_token_id=0, eos_token_id=1
        )
        names = {"adapter_names": [job.adapter or _BASE for job in batch]} if self.adapters else {}
        self._model.generate(
            input_ids=ids.to(self._model.device),
            attention_mask=mask.to(self._model.device),
            generation_config=options,
            streamer=_Steps(step),
            **names,
        )

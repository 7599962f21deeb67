"""The decoder below the output head: what it gave in a forward can be read by the head again, over other rows.

So logits of many rows come in slices, through the model's own code (soft caps and scales of logits included).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


class Trunk:
    """Of one loaded model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._decoder = model.get_decoder()

    @contextmanager
    def recording(self, wanted: bool) -> Iterator[list[Any]]:
        """Collects what the decoder returns in the forwards inside; nothing unless ``wanted``."""
        outputs: list[Any] = []
        if not wanted:
            yield outputs
            return
        handle = self._decoder.register_forward_hook(lambda module, args, output: outputs.append(output))
        try:
            yield outputs
        finally:
            handle.remove()

    def logits(self, output: Any, rows: Tensor) -> Tensor:
        """Logits [len(rows), vocabulary] over what the decoder returned once. rows: int64, on the model's device."""
        calls: list[Any] = []

        def forward(*args: Any, **kwargs: Any) -> Any:
            calls.append(output)
            return output

        self._decoder.forward = forward
        try:
            token = torch.zeros(1, 1, dtype=torch.int64, device=rows.device)
            logits: Tensor = self._model(input_ids=token, use_cache=False, logits_to_keep=rows).logits[0]
        finally:
            del self._decoder.forward
        if len(calls) != 1:
            raise RuntimeError(f"{type(self._model).__name__} calls its decoder {len(calls)} times in one forward")
        return logits

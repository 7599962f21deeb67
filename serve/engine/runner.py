"""Turns a schedule into one packed forward: tokens in adapter order, attention batch, adapter plans, logits."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from onebase.kernels.attention import AttentionBatch
from onebase.kernels.plan import BatchPlan, PlanCache, Run
from onebase.serve.engine.scheduler import Chunk
from onebase.serve.model.loader import LoadedModel
from onebase.serve.model.sites import StepPlans


class ModelRunner:
    """Runs the base model over a step's chunks."""

    def __init__(self, base: LoadedModel, plans: StepPlans) -> None:
        self._base = base
        self._plans = plans
        self._cache = PlanCache()

    @staticmethod
    def in_adapter_order(chunks: Rows[Chunk]) -> list[Chunk]:
        """Base rows first, then rows by adapters: so that the rows of one adapter are one segment."""
        return sorted(chunks, key=lambda chunk: (chunk.sequence.uses, chunk.sequence.order))

    @torch.inference_mode()
    def forward(self, chunks: Rows[Chunk]) -> Tensor | None:
        """Logits [number of sampling chunks, vocabulary] in the order of ``chunks``; None where none samples.

        ``chunks`` must be in adapter order.
        """
        device = self._base.device
        tokens, positions = (_upload(array, device) for array in _pack(chunks))
        keep = _sampled_rows(chunks)
        rows = keep if len(keep) else np.zeros(1, dtype=np.int64)  # transformers wants at least one
        self._plans.rows = self._plan([(c.num_tokens, c.sequence.uses) for c in chunks])
        self._plans.logits = self._plan([(1, c.sequence.uses) for c in chunks if c.samples])
        self._base.context.batch = self._attention_batch(chunks)
        out = self._base.model(
            input_ids=tokens[None],
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=_upload(rows, device),
        )
        self._base.context.batch = None
        logits: Tensor = out.logits[0]
        return logits if len(keep) else None

    def _plan(self, runs: list[Run]) -> BatchPlan | None:
        """None for a batch of base rows only: its sites then cost one branch."""
        plan = self._cache.from_runs(runs)
        return None if plan.is_base else plan

    def _attention_batch(self, chunks: Rows[Chunk]) -> AttentionBatch:
        return AttentionBatch.build(
            tuple(c.num_tokens for c in chunks),
            tuple(c.sequence.num_computed + c.num_tokens for c in chunks),
            [c.sequence.pages for c in chunks],
            self._base.context.page_size,
            self._base.device,
        )


def _pack(chunks: Rows[Chunk]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and positions of all chunks, one after the other: int64 [T] each."""
    tokens = [c.sequence.tokens[c.sequence.num_computed : c.sequence.num_computed + c.num_tokens] for c in chunks]
    spans = [range(c.sequence.num_computed, c.sequence.num_computed + c.num_tokens) for c in chunks]
    return (
        np.fromiter(chain.from_iterable(tokens), dtype=np.int64),
        np.fromiter(chain.from_iterable(spans), dtype=np.int64),
    )


def _sampled_rows(chunks: Rows[Chunk]) -> np.ndarray:
    ends = np.cumsum([c.num_tokens for c in chunks]) - 1
    return ends[[c.samples for c in chunks]].astype(np.int64)


def _upload(array: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor

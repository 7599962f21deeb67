"""Turns a schedule into one packed forward: inputs made on the host, the model over them, logits."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Rows
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from onebase.kernels.attention import AttentionBatch
from onebase.kernels.instructions import InstructionTable
from onebase.kernels.plan import BatchPlan, PlanCache, Run, Uses
from onebase.serve.engine.chunk import Chunk
from onebase.serve.engine.classes import Classes, classify, wants_classes
from onebase.serve.engine.decode_rows import DecodeRows
from onebase.serve.engine.graphs import DecodeGraphs, Forward
from onebase.serve.engine.inputs import StepInputs, Unseen, adapter_order, pack, sampled_rows
from onebase.serve.engine.pooling import pool_rows, wants_rows
from onebase.serve.engine.prefixes import store_prefixes
from onebase.serve.engine.prompts import Scores, score_prompts, wants_scores
from onebase.serve.engine.upload import upload
from onebase.serve.model.loader import LoadedModel
from onebase.serve.model.site_context import StepPlans
from onebase.serve.model.trunk import Trunk


class ModelRunner:
    """Runs the base model over a step's chunks.

    scores: of the prompts' tokens in the latest forward, by request; only of requests that asked for them. classes: of
    those that a classification head has read in it.
    """

    def __init__(self, base: LoadedModel, plans: StepPlans, instructions: InstructionTable) -> None:
        self.scores: Scores = {}
        self.classes: Classes = {}
        self._base = base
        self._plans = plans
        self._instructions = instructions
        self._cache = PlanCache()
        self._trunk = Trunk(base.model)
        self.graphs: DecodeGraphs | None = None
        self._decodes: DecodeRows | None = None  # of the latest step, where it was one of decodes alone

    def in_adapter_order(self, chunks: Rows[Chunk]) -> list[Chunk]:
        """See inputs.adapter_order. Where they follow the latest step's decodes they have that order already."""
        ordered = None if self._decodes is None else self._decodes.in_order(chunks)
        return sorted(chunks, key=adapter_order) if ordered is None else ordered

    @torch.inference_mode()
    def forward(self, chunks: Rows[Chunk], unseen: Unseen | None = None) -> Tensor | None:
        """Logits [number of sampling chunks, vocabulary] in the order of ``chunks``; None where none samples.

        ``chunks`` must be in adapter order. unseen: where their last tokens come from that the host has not seen.
        """
        self.scores, self.classes = {}, {}
        self._decodes = self._following(chunks)
        if self._decodes is not None:
            return self._compute(self._decodes.inputs(unseen, chunks), plain=True)
        read = [chunk for chunk in chunks if chunk.sequence.is_read]
        scored, classified = any(map(wants_scores, read)), any(map(wants_classes, read))
        pooled = any(map(wants_rows, read))
        keep = sampled_rows(chunks)
        rows = keep if len(keep) else np.zeros(1, dtype=np.int64)  # transformers wants at least one
        runs = [run for c in chunks if c.samples for run in c.sequence.runs(c.stop - c.num_draws, c.stop)]
        watched = scored or classified or pooled
        with self._trunk.recording(watched) as recorded:
            logits = self._run(chunks, rows, runs, unseen, plain=not watched)
        for hidden in recorded:
            if scored:
                self.scores = score_prompts(chunks, partial(self._logits, hidden), self._base.vocab_size)
            if classified:
                self.classes = classify(chunks, hidden[0][0])
            if pooled:
                pool_rows(chunks, hidden[0][0])
        return logits if len(keep) else None

    def _following(self, chunks: Rows[Chunk]) -> DecodeRows | None:
        """The latest step's rows one step later, or new ones; None where others than decodes are among them."""
        if self._decodes is not None and self._decodes.follow(chunks):
            return self._decodes
        return DecodeRows.of(chunks, self._base.context.page_size, self._base.device, self._plan)

    def recover(self) -> None:
        """After a step that raised: nothing follows its rows, and memory that it took in vain is free. Raises where the
        device itself is lost, which ends the process: the supervisor starts another one."""
        self._decodes = None
        if self._base.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def _run(
        self,
        chunks: Rows[Chunk],
        rows: NDArray[np.int64],
        runs: list[Run],
        unseen: Unseen | None = None,
        *,
        plain: bool = False,
    ) -> Tensor:
        """One forward: logits of these packed rows, which are ``runs`` to the adapters. plain: they are all that is
        asked of it."""
        inputs = self._inputs(chunks, rows, runs, unseen)
        store_prefixes(chunks, inputs.rows, self._instructions, self._base)
        return self._compute(inputs, plain=plain)

    def _compute(self, inputs: StepInputs, *, plain: bool) -> Tensor:
        """See _run; in a replayed graph where there is one."""
        logits = self.graphs.run(inputs) if self.graphs is not None and plain else None
        return self._forward(inputs) if logits is None else logits

    def use_graphs(self, make: Callable[[Forward], DecodeGraphs]) -> None:
        """From now on decode steps are replayed where they can be; see graphs.DecodeGraphs."""
        self.graphs = make(self._forward)

    @property
    def has_spare_work(self) -> bool:
        """Whether there is something to do for steps to come, while nobody waits for one."""
        return self.graphs is not None and self.graphs.is_pending

    @torch.inference_mode()
    def do_spare_work(self) -> None:
        """A part of it: less than a second."""
        if self.graphs is not None:
            self.graphs.capture_next()

    def _inputs(
        self, chunks: Rows[Chunk], rows: NDArray[np.int64], runs: list[Run], unseen: Unseen | None
    ) -> StepInputs:
        device = self._base.device
        ids, positions = pack(chunks)
        tokens, has_virtual = upload(ids, device), bool((ids < 0).any())
        tokens = tokens if unseen is None else unseen.put(tokens, chunks)
        return StepInputs(
            ids=tokens.clamp(min=0) if has_virtual else tokens,
            virtual=tokens if has_virtual else None,
            positions=upload(positions, device),
            logits_rows=upload(rows, device),
            attention=self._attention_batch(chunks),
            rows=self._plan([run for c in chunks for run in c.sequence.runs(c.start, c.stop)]),
            logits=self._plan(runs),
        )

    def _forward(self, inputs: StepInputs) -> Tensor:
        """Logits [len(inputs.logits_rows), vocabulary]. Reads nothing of the step but ``inputs``."""
        self._plans.tokens, self._plans.rows, self._plans.logits = inputs.virtual, inputs.rows, inputs.logits
        context = self._base.context
        context.batch = inputs.attention
        try:
            out = self._base.model(
                input_ids=inputs.ids[None],
                position_ids=inputs.positions[None],
                use_cache=False,
                logits_to_keep=inputs.logits_rows,
            )
        except BaseException:
            context.forget()
            raise
        context.batch = None
        logits: Tensor = out.logits[0]
        return logits

    def _logits(self, hidden: Any, rows: Rows[int], uses: Rows[Uses]) -> Tensor:
        """Of other rows of a forward whose trunk gave ``hidden``."""
        plan = BatchPlan.from_rows(uses)
        self._plans.logits = None if plan.is_base else plan
        return self._trunk.logits(hidden, upload(np.asarray(rows), self._base.device))

    def _plan(self, runs: list[Run]) -> BatchPlan | None:
        """None for a batch of base rows only: its sites then cost one branch."""
        plan = self._cache.from_runs(runs)
        return None if plan.is_base else plan

    def _attention_batch(self, chunks: Rows[Chunk]) -> AttentionBatch:
        return AttentionBatch.build(
            tuple(c.num_tokens for c in chunks),
            tuple(c.stop for c in chunks),
            [c.sequence.pages for c in chunks],
            self._base.context.page_size,
            self._base.device,
        )

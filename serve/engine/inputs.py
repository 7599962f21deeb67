"""What a forward reads: packed tokens, positions, the attention batch, the adapters' plans. Made on the host."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from onebase.kernels.attention import AttentionBatch
from onebase.kernels.plan import BatchPlan, Uses
from onebase.serve.engine.chunk import Chunk
from onebase.serve.engine.sequence import Sequence
from onebase.serve.engine.upload import upload


@dataclass(frozen=True, slots=True, eq=False)
class StepInputs:
    """All that one forward reads, on the model's device.

    ids: int64 [T], 0 for virtual tokens; virtual: the same with virtual ones negative, None where there are none.
    positions: int64 [T]. logits_rows: int64, the packed rows that reach the output head. rows, logits: plans over the
    packed rows and over those; None where all of them are the base's.
    """

    ids: Tensor
    virtual: Tensor | None
    positions: Tensor
    logits_rows: Tensor
    attention: AttentionBatch
    rows: BatchPlan | None
    logits: BatchPlan | None


@dataclass(frozen=True, slots=True, eq=False)
class Unseen:
    """Tokens that the device has drawn and the host has not seen. tokens: int64 [rows] on the device; rows: of whom."""

    tokens: Tensor
    rows: Mapping[Sequence, int]

    def put(self, ids: Tensor, chunks: Rows[Chunk]) -> Tensor:
        """ids [T] of these chunks with the unseen tokens in their places, in place. No synchronisation."""
        ends = np.cumsum([chunk.num_tokens for chunk in chunks]) - 1
        reads = [chunk.stop > len(chunk.sequence.tokens) for chunk in chunks]
        rows = [self.rows[chunk.sequence] for chunk, read in zip(chunks, reads, strict=True) if read]
        if not rows:
            return ids
        where, source = upload(np.stack([ends[reads], np.asarray(rows)]).astype(np.int64), ids.device)
        return ids.index_copy_(0, where, self.tokens.index_select(0, source))


def adapter_order(chunk: Chunk) -> tuple[Uses, Uses, int]:
    """Base rows first, then rows by adapters, so that the rows of one adapter are one segment.

    Where an adapter is activated inside a chunk its base rows come first, beside the others'."""
    sequence = chunk.sequence
    last = sequence.uses_at(chunk.stop - 1)
    return last, last if chunk.num_tokens == 1 else sequence.uses_at(chunk.start), sequence.order


def pack(chunks: Rows[Chunk]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Token ids (virtual ones are negative) and position ids of all chunks, one after the other: int64 [T] each.

    Tokens that the host has not seen are 0."""
    tokens = [_tokens(c) for c in chunks]
    spans = [range(c.sequence.placed.position(c.start), c.sequence.placed.position(c.stop)) for c in chunks]
    return (
        np.fromiter(chain.from_iterable(tokens), dtype=np.int64),
        np.fromiter(chain.from_iterable(spans), dtype=np.int64),
    )


def _tokens(chunk: Chunk) -> list[int]:
    found = chunk.sequence.tokens[chunk.start : chunk.stop]
    return found if len(found) == chunk.num_tokens else [*found, *(chunk.drafts or (0,))]


def sampled_rows(chunks: Rows[Chunk]) -> NDArray[np.int64]:
    """The packed rows after which a token is drawn."""
    ends = np.cumsum([c.num_tokens for c in chunks])
    draws = np.array([c.num_draws for c in chunks])
    if draws.max() <= 1:
        return (ends[draws > 0] - 1).astype(np.int64)
    return np.concatenate([np.arange(end - count, end) for end, count in zip(ends, draws, strict=True)])

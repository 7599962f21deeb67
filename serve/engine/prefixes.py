"""Stored keys and values (prefix tuning, cartridges) on their way into the pages of the sequences that start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from onebase.kernels.instructions import InstructionTable
from onebase.kernels.ops.prefix import KvPrefix
from onebase.kernels.plan import BatchPlan
from onebase.serve.engine.chunk import Chunk
from onebase.serve.model.loader import LoadedModel


def store_prefixes(
    chunks: Sequence[Chunk], plan: BatchPlan | None, instructions: InstructionTable, base: LoadedModel
) -> None:
    """Before the forward: one copy a layer for all sequences of the step that have slots to be copied.

    plan: of the step's rows, which name the adapters that act in it.
    """
    starting = [chunk for chunk in chunks if chunk.sequence.uncopied]
    if not starting or plan is None:
        return
    pages, offsets = _slots(starting, base.context.page_size, base.device)
    for index, layer in zip(sorted(base.context.caches), base.layers, strict=True):
        placed = instructions.placed(layer.attention, plan)
        prefixes = {item.segment.handle: item.op for item in placed if isinstance(item.op, KvPrefix)}
        stored = [_rows(chunk, prefixes) for chunk in starting]
        base.context.caches[index].put(pages, offsets, torch.cat(stored, dim=1))


def _slots(chunks: Sequence[Chunk], page_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Page and offset of every slot to be filled, [n] each."""
    spans = [np.arange(c.sequence.uncopied.start, c.sequence.uncopied.stop) for c in chunks]
    pages = [np.asarray(c.sequence.pages)[span // page_size] for c, span in zip(chunks, spans, strict=True)]
    where = np.stack([np.concatenate(pages), np.concatenate(spans) % page_size])
    on_device = torch.from_numpy(where).to(device, non_blocking=True)
    return on_device[0], on_device[1]


def _rows(chunk: Chunk, prefixes: Mapping[int, KvPrefix]) -> Tensor:
    """[2, slots to be filled, kv_heads, head_dim]"""
    sequence = chunk.sequence
    op = next(prefixes[handle] for handle, _ in sequence.uses_at(chunk.start) if handle in prefixes)
    span = slice(sequence.uncopied.start, sequence.uncopied.stop)
    return torch.stack([op.keys[span], op.values[span]])

"""Classification: which rows of a step an adapter's head reads, and what it says of them, in float32.

As transformers pools: a sequence is read at its last token that is not the base's padding token, or at its last one
where virtual tokens stand before it as embeddings.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from onebase.adapters.errors import RequestRejected
from onebase.adapters.program import Head
from onebase.adapters.traits import Traits
from onebase.serve.engine.chunk import Chunk
from onebase.serve.engine.layout import Layout
from onebase.serve.engine.messages import AdapterUse, ClassLogits, Request

Classes = dict[str, ClassLogits | None]  # by request; None where the logits are not finite
NO_HEAD = "the model has no classification head: name an adapter that was trained for SEQ_CLS or TOKEN_CLS"


@dataclass(frozen=True, slots=True)
class _Part:
    """The rows of one chunk that its request's head reads: ``rows`` of the packed step."""

    id: str
    rows: slice


def check_heads(uses: Sequence[AdapterUse], traits: Sequence[Traits]) -> None:
    """Raises RequestRejected unless exactly one of a request's adapters has a head."""
    names = [repr(use.name or use.digest) for use, one in zip(uses, traits, strict=True) if one.classifies]
    if not names:
        raise RequestRejected(NO_HEAD, param="model")
    if len(names) > 1:
        message = f"adapters {' and '.join(names)} have a classification head each: one request can have one"
        raise RequestRejected(message, param="adapters")


def read_slots(request: Request, traits: Sequence[Traits], layout: Layout, pad: int | None) -> range:
    """The slots that the head reads; none for a request that generates. pad: the base's padding token."""
    if not request.classifies:
        return range(0)
    first = layout.num_virtual
    if any(one.per_token for one in traits if one.classifies):
        return range(first, first + len(request.prompt))
    embedded = layout.num_virtual > layout.num_stored
    at = len(request.prompt) - 1 if embedded else _last_but(pad, request.prompt)
    return range(first + at, first + at + 1)


def wants_classes(chunk: Chunk) -> bool:
    """Whether a head reads any row of the chunk."""
    return bool(chunk.sequence.unclassified) and bool(_slots(chunk))


def classify(chunks: Iterable[Chunk], hidden: Tensor, at_once: int | None = None) -> Classes:
    """What the heads say of a step's packed rows. hidden: [T, width], what the output head reads, of all chunks.

    All rows of one head are one product, or one for each ``at_once`` of them: products round by their shape.
    """
    found: Classes = {}
    for head, parts in _by_head(chunks).items():
        rows = torch.cat([hidden[part.rows] for part in parts]).float()
        step = at_once or len(rows)
        pieces = [rows[at : at + step].clone() for at in range(0, len(rows), step)]
        logits = torch.cat([functional.linear(piece, head.weight, head.bias) for piece in pieces]).cpu()
        at = 0
        for part in parts:
            stop = at + part.rows.stop - part.rows.start
            found[part.id] = _told(head, logits[at:stop])
            at = stop
    return found


def merge(classes: Classes, more: Mapping[str, ClassLogits | None]) -> None:
    """Add what was said of later rows of the same step."""
    for request_id, new in more.items():
        old = classes.get(request_id, new)
        joined = new and old and replace(new, logits=old.logits + new.logits)
        classes[request_id] = joined if request_id in classes else new


def _by_head(chunks: Iterable[Chunk]) -> dict[Head, list[_Part]]:
    parts: dict[Head, list[_Part]] = {}
    first = 0
    for chunk in chunks:
        slots = _slots(chunk)
        if slots:
            head = next(entry.head for entry in chunk.sequence.adapters if entry.head is not None)
            rows = slice(first + slots.start - chunk.start, first + slots.stop - chunk.start)
            parts.setdefault(head, []).append(_Part(chunk.sequence.id, rows))
        first += chunk.num_tokens
    return parts


def _slots(chunk: Chunk) -> range:
    """Slots of the chunk that are still to be read."""
    left = chunk.sequence.unclassified
    start, stop = max(chunk.start, left.start), min(chunk.stop, left.stop)
    return range(start, max(start, stop))


def _told(head: Head, logits: Tensor) -> ClassLogits | None:
    values = logits.numpy()
    return ClassLogits(head.num_labels, head.per_token, values.tobytes()) if np.isfinite(values).all() else None


def _last_but(pad: int | None, prompt: Sequence[int]) -> int:
    """Position of the last token that is not ``pad``; 0 where all are."""
    if pad is None:
        return len(prompt) - 1
    return next((at for at in range(len(prompt) - 1, 0, -1) if prompt[at] != pad), 0)

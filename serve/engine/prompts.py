"""Log-probabilities of prompts: which rows of a step tell them, in slices that bound the memory that logits take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from onebase.kernels.plan import Uses
from onebase.serve.engine.chunk import Chunk
from onebase.serve.engine.logprobs import BLOCK, cut, joined, score
from onebase.serve.engine.messages import Logprobs

Scores = dict[str, Logprobs | None]  # None where the logits of a prompt are not finite
Logits = Callable[[Sequence[int], Sequence[Uses]], Tensor]  # packed rows and what each of them uses -> [rows, vocab]


@dataclass(frozen=True, slots=True)
class _Part:
    """The rows of one chunk that predict tokens of its prompt. first: the first of them in the packed step; uses: of
    each row."""

    id: str
    first: int
    targets: tuple[int, ...]
    uses: tuple[Uses, ...]
    width: int


def wants_scores(chunk: Chunk) -> bool:
    """Whether any row of the chunk predicts a token of the prompt whose log-probability was asked for."""
    return bool(_slots(chunk))


def score_prompts(chunks: Sequence[Chunk], logits: Logits, vocab_size: int, at_once: int | None = None) -> Scores:
    """Of all chunks of a step, ``at_once`` rows at a time; as many as make a BLOCK where it is None."""
    parts = _parts(chunks)
    rows = [part.first + at for part in parts for at in range(len(part.targets))]
    uses = [use for part in parts for use in part.uses]
    targets = [token for part in parts for token in part.targets]
    width = max(part.width for part in parts)
    step = at_once or max(1, BLOCK // vocab_size)
    slices = [slice(at, at + step) for at in range(0, len(rows), step)]
    scored = [_scored(logits(rows[at], uses[at]), targets[at], width) for at in slices]
    return _by_request(parts, scored, step)


def merge(scores: Scores, more: Scores) -> None:
    """Add the scores of a later part of the same step."""
    for request_id, new in more.items():
        old = scores.get(request_id, new)
        scores[request_id] = new if request_id not in scores else old and new and joined([old, new])


def _scored(logits: Tensor, targets: Sequence[int], width: int) -> Logprobs | None:
    return score(logits, torch.tensor(targets).to(logits.device), width)


def _by_request(parts: Sequence[_Part], scored: Sequence[Logprobs | None], step: int) -> Scores:
    found: Scores = {}
    start = 0
    for part in parts:
        stop = start + len(part.targets)
        pieces = [
            whole and cut(whole, max(start - at * step, 0), stop - at * step, part.width)
            for at, whole in enumerate(scored)
            if at * step < stop and start < (at + 1) * step
        ]
        finite = [piece for piece in pieces if piece is not None]
        found[part.id] = joined(finite) if len(finite) == len(pieces) else None
        start = stop
    return found


def _parts(chunks: Sequence[Chunk]) -> list[_Part]:
    parts: list[_Part] = []
    first = 0
    for chunk in chunks:
        sequence, slots = chunk.sequence, _slots(chunk)
        width = sequence.request.sampling.prompt_logprobs
        if slots and width is not None:
            targets = tuple(sequence.tokens[slots.start + 1 : slots.stop + 1])
            uses = tuple(sequence.uses_at(slot) for slot in slots)
            parts.append(_Part(sequence.id, first + slots.start - chunk.start, targets, uses, width))
        first += chunk.num_tokens
    return parts


def _slots(chunk: Chunk) -> range:
    """Slots of the chunk with tokens of the prompt, whose next token is one of the prompt too and was not told yet."""
    sequence = chunk.sequence
    if sequence.request.sampling.prompt_logprobs is None:
        return range(0)
    first = sequence.num_virtual
    start = max(chunk.start, first + sequence.num_scored)
    stop = min(chunk.stop, first + len(sequence.request.prompt) - 1)
    return range(start, max(start, stop))

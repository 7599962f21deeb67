"""What requests ask of the logits before tokens are drawn: biases, penalties, ends that must wait, grammars.

Rows that ask for nothing are not touched, and a batch where nobody asks costs nothing. In this order, as in other
servers: logit_bias, repetition_penalty, frequency_penalty and presence_penalty, min_tokens, grammar.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows

import numpy as np
import torch
from torch import Tensor

from onebase.serve.engine.asked import wants_penalties
from onebase.serve.engine.masks import apply_masks, packed_masks
from onebase.serve.engine.sequence import Sequence
from onebase.serve.engine.token_counts import TokenCounts
from onebase.serve.engine.upload import upload

Entry = tuple[int, int, float]  # row, token, value


def adjusted(logits: Tensor, sequences: Rows[Sequence]) -> Tensor:
    """logits: [rows, vocabulary]; they themselves where nobody asks for anything, else a float32 copy."""
    biases = _biases(sequences)
    penalised = [row for row, sequence in enumerate(sequences) if wants_penalties(sequence.request.sampling)]
    matched = [row for row, sequence in enumerate(sequences) if sequence.matcher is not None]
    early = _early_ends(sequences, logits.shape[-1])
    if not (biases or penalised or matched or early):
        return logits
    changed = logits.to(torch.float32, copy=True)
    _add(changed, biases)
    for row in penalised:
        _penalise(changed[row], sequences[row])
    _add(changed, early)
    if matched:
        apply_masks(changed, matched, packed_masks([sequences[row] for row in matched], logits.shape[-1]))
    return changed


def _biases(sequences: Rows[Sequence]) -> list[Entry]:
    return [(row, *bias) for row, sequence in enumerate(sequences) for bias in sequence.request.sampling.logit_bias]


def _early_ends(sequences: Rows[Sequence], vocab_size: int) -> list[Entry]:
    """Minus infinity for tokens that would end an answer before its min_tokens; masks.py sees to those of a grammar."""
    return [
        (row, token, float("-inf"))
        for row, sequence in enumerate(sequences)
        if sequence.matcher is None and sequence.num_generated < sequence.request.sampling.min_tokens
        for token in sequence.ends
        if token < vocab_size
    ]


def _add(logits: Tensor, entries: Rows[Entry]) -> None:
    """In place. No (row, token) comes twice with a finite value."""
    if not entries:
        return
    rows, tokens, values = zip(*entries, strict=True)
    at = upload(np.array([rows, tokens], dtype=np.int64), logits.device)
    logits.index_put_((at[0], at[1]), upload(np.array(values, dtype=np.float32), logits.device), accumulate=True)


def _penalise(logits: Tensor, sequence: Sequence) -> None:
    """One row [vocabulary], in place. Repetition: arXiv:1909.05858, over prompt and answer; frequency and presence, as
    OpenAI defines them, over the answer."""
    sampling = sequence.request.sampling
    counts = sequence.counts = sequence.counts or TokenCounts(len(logits), logits.device)
    counts.catch_up(sequence.tokens, sequence.num_virtual, sequence.start_len)
    if sampling.repetition_penalty != 1.0:
        repeated = torch.where(logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty)
        torch.where(counts.seen, repeated, logits, out=logits)
    if sampling.frequency_penalty:
        logits.sub_(counts.generated, alpha=sampling.frequency_penalty)
    if sampling.presence_penalty:
        logits.sub_((counts.generated > 0).float(), alpha=sampling.presence_penalty)

"""Grammars in a batch: one packed mask for all rows that have one, made on the host, applied on the device."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from onebase.serve.engine.grammar import Matcher
from onebase.serve.engine.sequence import Sequence
from onebase.serve.engine.upload import upload

_CLEAR = 1 - np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")


def packed_masks(sequences: Rows[Sequence], vocab_size: int) -> NDArray[np.int32]:
    """int32 [sequences, words], see Matcher.fill; all of the sequences have a matcher.

    Before min_tokens the tokens that end a sequence are left out, unless the grammar allows nothing else.
    """
    bits = np.zeros((len(sequences), -(-vocab_size // 32)), dtype=np.int32)
    Matcher.fill([sequence.matcher for sequence in sequences if sequence.matcher is not None], bits)
    for row, sequence in enumerate(sequences):
        if sequence.num_generated < sequence.request.sampling.min_tokens:
            _leave_out(bits[row], [token for token in sequence.ends if token < vocab_size])
    return bits


def _leave_out(bits: NDArray[np.int32], tokens: Rows[int]) -> None:
    """One row, in place; as it was where nothing would be left."""
    left = bits.view(np.uint32).copy()
    for token in tokens:
        left[token // 32] &= ~np.uint32(1 << token % 32)
    if left.any():
        bits[:] = left.view(np.int32)


def apply_masks(logits: Tensor, rows: Rows[int], bits: NDArray[np.int32]) -> None:
    """Minus infinity for what is not allowed: logits [*, vocabulary], in place; bits: of these rows."""
    device, vocabulary = logits.device, logits.shape[-1]
    places = upload(bits.view(np.uint8), device)
    refused = _refused(device).take(places.long()).view(torch.bool)[:, :vocabulary]  # bool [rows, vocabulary]
    for row, mask in zip(rows, refused, strict=True):
        logits[row].masked_fill_(mask, float("-inf"))


@cache
def _refused(device: torch.device) -> Tensor:
    """int64 [256]: of each byte its eight bits, lowest first, as eight booleans that say what is not set."""
    return torch.from_numpy(_CLEAR.view(np.int64)[:, 0]).to(device)

"""From a step's logits to the token of each sequence, with its log-probabilities where they were asked for."""

from __future__ import annotations

from collections.abc import Sequence as Rows

import torch
from torch import Tensor

from onebase.serve.engine.logprobs import told
from onebase.serve.engine.messages import Logprobs
from onebase.serve.engine.sampler import sample
from onebase.serve.engine.sequence import Sequence

Drawn = tuple[int, Logprobs | None]


def draw(logits: Tensor, sequences: Rows[Sequence]) -> list[Drawn]:
    """logits: [rows, vocabulary], a row for each sequence. Tokens may be NOT_FINITE."""
    params = [sequence.request.sampling for sequence in sequences]
    tokens = sample(logits, params, [len(sequence.tokens) for sequence in sequences])
    return list(zip(tokens.tolist(), told(logits, tokens, params), strict=True))


def draw_apart(logits: Tensor, sequences: Rows[Sequence]) -> list[Drawn]:
    """The same, each row by itself: sums over a row round by the number of rows."""
    rows = [row.clone() for row in torch.split(logits, 1)]
    return [one for row, sequence in zip(rows, sequences, strict=True) for one in draw(row, [sequence])]

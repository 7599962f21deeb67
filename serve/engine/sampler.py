"""Picks the next tokens of a batch, on the device, without a sync.

Each row draws one uniform number from a counter-based generator keyed by (seed, position) and inverts the cumulative
distribution. So the same seed gives the same draws whatever the batch mates, and a preempted sequence draws again
what it drew before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence as Rows

import numpy as np
import torch
from torch import Tensor

from onebase.serve.engine.filters import kept
from onebase.serve.engine.greedy import NOT_FINITE, greedy
from onebase.serve.engine.messages import SamplingParams
from onebase.serve.engine.upload import upload

# Rows are drawn in blocks of about this many probabilities, so that the temporaries stay small beside the model.
_BLOCK = 1 << 24


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) from blake2b(seed, position): 53 bits, the same on every machine."""
    key = seed.to_bytes(16, "little", signed=True) + position.to_bytes(8, "little")
    return (int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 11) / (1 << 53)


def sample(logits: Tensor, params: Rows[SamplingParams], positions: Rows[int]) -> Tensor:
    """Next token of each row. logits: [rows, vocabulary], any float dtype; returns int64 [rows] on the same device.

    positions: index of the token being drawn in its sequence. Order of the filters: temperature, top_k, top_p, min_p.
    A row whose logits are not finite gives NOT_FINITE, see greedy.
    """
    tokens = greedy(logits)
    bad = tokens == NOT_FINITE
    plain = [row for row, p in enumerate(params) if p.temperature > 0.0 and not _is_filtered(p)]
    filtered = [row for row, p in enumerate(params) if p.temperature > 0.0 and _is_filtered(p)]
    for rows, draw in ((plain, _draw_plain), (filtered, _draw_filtered)):
        step = max(1, _BLOCK // logits.shape[-1])
        for block in (rows[at : at + step] for at in range(0, len(rows), step)):
            chosen = [params[row] for row in block]
            draws = [uniform(params[row].seed, positions[row]) for row in block]
            index = upload(np.array(block, dtype=np.int64), logits.device)
            tokens[index] = draw(_probabilities(logits[index], chosen), chosen, _column(draws, logits.device))
    return tokens.masked_fill(bad, NOT_FINITE)


def _is_filtered(p: SamplingParams) -> bool:
    return p.top_k > 0 or p.top_p < 1.0 or p.min_p > 0.0


def _column(values: Rows[float], device: torch.device) -> Tensor:
    """[rows, 1] float32."""
    return upload(np.array(values, dtype=np.float32), device)[:, None]


def _probabilities(logits: Tensor, params: Rows[SamplingParams]) -> Tensor:
    temperature = _column([max(p.temperature, 1e-6) for p in params], logits.device)
    return torch.softmax(logits.float() / temperature, dim=-1)


def _invert(weights: Tensor, draws: Tensor) -> Tensor:
    """Invert the cumulative distribution. weights: [rows, n], not necessarily normalised; zero is never drawn."""
    cumulative = weights.cumsum(dim=-1)
    target = draws * cumulative[:, -1:]
    last = weights.shape[-1] - 1 - (weights > 0).flip(-1).to(torch.uint8).argmax(dim=-1)  # draws may round up to 1
    return torch.minimum(torch.searchsorted(cumulative, target, right=True)[:, 0], last)


def _draw_plain(probs: Tensor, params: Rows[SamplingParams], draws: Tensor) -> Tensor:
    return _invert(probs, draws)


def _draw_filtered(probs: Tensor, params: Rows[SamplingParams], draws: Tensor) -> Tensor:
    weights, tokens = kept(probs, params)
    return tokens.gather(-1, _invert(weights, draws).unsqueeze(1))[:, 0]

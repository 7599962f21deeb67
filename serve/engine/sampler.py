"""Picks the next tokens of a batch, on the device, without a sync.

Each row draws one uniform number from a counter-based generator keyed by (seed, position) and inverts the cumulative
distribution. So the same seed gives the same draws whatever the batch mates, and a preempted sequence draws again
what it drew before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence as Rows

import torch
from torch import Tensor

from onebase.serve.engine.messages import SamplingParams


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) from blake2b(seed, position): 53 bits, the same on every machine."""
    key = seed.to_bytes(16, "little", signed=True) + position.to_bytes(8, "little")
    return (int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 11) / (1 << 53)


def sample(logits: Tensor, params: Rows[SamplingParams], positions: Rows[int]) -> Tensor:
    """Next token of each row. logits: [rows, vocabulary], any float dtype; returns int64 [rows] on the same device.

    positions: index of the token being drawn in its sequence. Order of the filters: temperature, top_k, top_p, min_p.
    """
    if all(p.temperature == 0.0 for p in params):
        return logits.argmax(dim=-1)
    device = logits.device
    temperature = _column([p.temperature for p in params], device)
    probs = torch.softmax(logits.float() / temperature.clamp(min=1e-6), dim=-1)
    draws = _column([uniform(p.seed, at) for p, at in zip(params, positions, strict=True)], device)
    drawn = _draw(probs, draws)
    filtered = [p.top_k > 0 or p.top_p < 1.0 or p.min_p > 0.0 for p in params]
    if any(filtered):  # only those rows take filtered draws: the other ones must not depend on their batch mates
        drawn = torch.where(_column(filtered, device)[:, 0] > 0, _draw_filtered(probs, params, draws), drawn)
    return torch.where(temperature[:, 0] == 0.0, logits.argmax(dim=-1), drawn)


def _column(values: Rows[float], device: torch.device) -> Tensor:
    column = torch.tensor(values, dtype=torch.float64).unsqueeze(1)
    return column.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else column


def _draw(weights: Tensor, draws: Tensor) -> Tensor:
    """Invert the cumulative distribution. weights: [rows, n], not necessarily normalised; zero is never drawn."""
    cumulative = weights.double().cumsum(dim=-1)
    target = draws * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).clamp(max=weights.shape[-1] - 1)[:, 0]


def _draw_filtered(probs: Tensor, params: Rows[SamplingParams], draws: Tensor) -> Tensor:
    ordered, tokens = probs.sort(dim=-1, descending=True, stable=True)
    device, vocabulary = probs.device, probs.shape[-1]
    top_k = _column([p.top_k or vocabulary for p in params], device)
    top_p = _column([p.top_p for p in params], device)
    min_p = _column([p.min_p for p in params], device)
    rank = torch.arange(vocabulary, device=device)
    kept = ordered.double().masked_fill(rank >= top_k, 0.0)
    kept = kept / kept.sum(dim=-1, keepdim=True)
    before = kept.cumsum(dim=-1) - kept  # mass of the more likely tokens: the one that crosses top_p is kept
    kept = kept.masked_fill((before >= top_p) & (rank > 0), 0.0)
    kept = kept.masked_fill(kept < min_p * kept[:, :1], 0.0)
    return tokens.gather(-1, _draw(kept, draws).unsqueeze(1))[:, 0]

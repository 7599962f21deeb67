"""Log-probabilities of tokens: made from logits on the device, sent as flat arrays, read again on the API side."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from onebase.serve.engine.messages import Logprobs

LEAST = -9999.0  # what the protocol says in place of minus infinity
# Logits that are turned into log-probabilities at once, so that the temporaries stay small beside the model.
BLOCK = 1 << 24


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token. logprob: None for the first of a sequence, which nothing predicts. rank: 1 for the likeliest token.

    top: the likeliest tokens and their log-probabilities, likeliest first.
    """

    token: int
    logprob: float | None = None
    rank: int | None = None
    top: tuple[tuple[int, float], ...] = ()


def score(logits: Tensor, tokens: Tensor, width: int) -> Logprobs | None:
    """Of all rows, see ``score_table``. None where a row is not finite. One copy to the host, whatever the width."""
    width = min(width, logits.shape[-1])
    return pack(score_table(logits, tokens, width).cpu().numpy(), width)


def score_table(logits: Tensor, tokens: Tensor, width: int) -> Tensor:
    """Log-softmax in float32, before any temperature. logits: [n, vocabulary]; tokens: int64 [n], same device.

    float64 [n, 3 + 2 * width], on the device: token, log-probability, rank, the likeliest tokens, their
    log-probabilities; all of them are exact in float64. width: at most the vocabulary.
    """
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    chosen = logprobs.gather(1, tokens[:, None])
    ranks = (logprobs > chosen).sum(dim=-1, keepdim=True) + 1
    top, top_tokens = torch.topk(logprobs, width, dim=-1)
    return torch.cat([part.double() for part in (tokens[:, None], chosen, ranks, top_tokens, top)], dim=1)


def pack(table: NDArray[np.float64], width: int) -> Logprobs | None:
    """A ``score_table`` on the host. None where a row is not finite."""
    if np.isnan(table).any():
        return None
    tokens, chosen, ranks, top_tokens, top = np.split(table, np.cumsum((1, 1, 1, width)), axis=1)
    return Logprobs(
        width=width,
        tokens=tokens.astype(np.int32).tobytes(),
        chosen=chosen.clip(LEAST).astype(np.float32).tobytes(),
        ranks=ranks.astype(np.int32).tobytes(),
        top_tokens=top_tokens.astype(np.int32).tobytes(),
        top=top.clip(LEAST).astype(np.float32).tobytes(),
    )


def joined(parts: Iterable[Logprobs]) -> Logprobs:
    """Log-probabilities of consecutive tokens as one; all have the same width, and there is at least one."""
    whole = list(parts)
    fields = ("tokens", "chosen", "ranks", "top_tokens", "top")
    return Logprobs(whole[0].width, *(b"".join(getattr(part, name) for part in whole) for name in fields))


def cut(logprobs: Logprobs, start: int, stop: int, width: int) -> Logprobs:
    """The tokens [start, stop), with no more than ``width`` alternatives each."""
    width = min(width, logprobs.width)
    singles = (raw[4 * start : 4 * stop] for raw in (logprobs.tokens, logprobs.chosen, logprobs.ranks))
    tables = (
        np.frombuffer(raw, np.int32).reshape(-1, logprobs.width)[start:stop, :width].tobytes() if width else b""
        for raw in (logprobs.top_tokens, logprobs.top)
    )
    return Logprobs(width, *singles, *tables)


def unpack(logprobs: Logprobs) -> tuple[TokenLogprob, ...]:
    """The tokens in order."""
    tokens, ranks = (np.frombuffer(raw, np.int32).tolist() for raw in (logprobs.tokens, logprobs.ranks))
    chosen = np.frombuffer(logprobs.chosen, np.float32).tolist()
    shape = (len(tokens), logprobs.width)
    top_tokens = np.frombuffer(logprobs.top_tokens, np.int32).reshape(shape).tolist()
    top = np.frombuffer(logprobs.top, np.float32).reshape(shape).tolist()
    return tuple(
        TokenLogprob(token, logprob, rank, tuple(zip(others, values, strict=True)))
        for token, logprob, rank, others, values in zip(tokens, chosen, ranks, top_tokens, top, strict=True)
    )

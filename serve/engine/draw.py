"""From a step's logits to the token of each sequence, with its log-probabilities where they were asked for.

Everything is launched on the device by ``begin``; what the host wants of it comes over in one copy, which ``result``
waits for. So the next forward may start from ``tokens`` before the host has seen them.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from onebase.serve.engine.adjust import adjusted
from onebase.serve.engine.greedy import greedy
from onebase.serve.engine.logprobs import BLOCK, pack, score_table
from onebase.serve.engine.messages import Logprobs
from onebase.serve.engine.sampler import sample
from onebase.serve.engine.sequence import Sequence

Drawn = tuple[int, Logprobs | None]


class Pending(Protocol):
    """Tokens that are being drawn. tokens: int64 [rows] on the device, each of them in the vocabulary, so that the
    next forward may read them without a sync."""

    @property
    def tokens(self) -> Tensor: ...

    def result(self) -> list[Drawn]:
        """Waits for the one copy of the step. Tokens may be NOT_FINITE."""


@dataclass(frozen=True, slots=True)
class _Scored:
    """Log-probabilities of some rows of one step. table: see logprobs.score_table."""

    rows: tuple[int, ...]
    widths: tuple[int, ...]
    table: Tensor


def begin(logits: Tensor, sequences: Rows[Sequence], ahead: Rows[int] = ()) -> Pending:
    """logits: [rows, vocabulary], a row for each sequence, of which all tokens but those of steps under way are known
    to the host. Log-probabilities are those of the model, before anything that a request asks of its draws.

    ahead: of each row, how many drafts stand between the sequence's tokens and the one that is drawn; empty: none."""
    return _Draw([_launched(logits, sequences, ahead or [0] * len(sequences))])


def begin_apart(logits: Tensor, sequences: Rows[Sequence], ahead: Rows[int] = ()) -> Pending:
    """The same, each row by itself: sums over a row round by the number of rows."""
    rows = [row.clone() for row in torch.split(logits, 1)]
    places = ahead or [0] * len(sequences)
    return _Draw([_launched(row, [one], [at]) for row, one, at in zip(rows, sequences, places, strict=True)])


def draw(logits: Tensor, sequences: Rows[Sequence]) -> list[Drawn]:
    """``begin``, and its result at once."""
    return begin(logits, sequences).result()


def draw_apart(logits: Tensor, sequences: Rows[Sequence]) -> list[Drawn]:
    """``begin_apart``, and its result at once."""
    return begin_apart(logits, sequences).result()


@dataclass(frozen=True, slots=True)
class _Launched:
    """tokens: int64 [rows], NOT_FINITE among them."""

    tokens: Tensor
    scored: list[_Scored]


def _launched(logits: Tensor, sequences: Rows[Sequence], ahead: Rows[int]) -> _Launched:
    if all(sequence.is_greedy for sequence in sequences):
        return _Launched(greedy(logits), [])
    return _drawn(logits, sequences, ahead)


def _drawn(logits: Tensor, sequences: Rows[Sequence], ahead: Rows[int]) -> _Launched:
    """Whatever they ask for."""
    params = [sequence.request.sampling for sequence in sequences]
    positions = [len(sequence.tokens) + drafts for sequence, drafts in zip(sequences, ahead, strict=True)]
    tokens = sample(adjusted(logits, sequences), params, positions)
    return _Launched(tokens, _scored(logits, tokens, [p.logprobs for p in params]))


def _scored(logits: Tensor, tokens: Tensor, widths: Rows[int | None]) -> list[_Scored]:
    """Of the rows whose width is not None, in blocks. Costs nothing where there is none."""
    asked = [row for row, width in enumerate(widths) if width is not None]
    vocabulary = logits.shape[-1]
    step = max(1, BLOCK // vocabulary)
    found = []
    for rows in (asked[at : at + step] for at in range(0, len(asked), step)):
        wanted = tuple(min(widths[row] or 0, vocabulary) for row in rows)
        table = score_table(logits[rows], tokens[rows].clamp(min=0), max(wanted))
        found.append(_Scored(tuple(rows), wanted, table))
    return found


class _Draw:
    """Pending over launches of consecutive rows."""

    def __init__(self, launches: Rows[_Launched]) -> None:
        self._launches = launches
        self._drawn = launches[0].tokens if len(launches) == 1 else torch.cat([one.tokens for one in launches])
        tables = [scored.table.flatten() for launched in launches for scored in launched.scored]
        # token ids are exact in float64
        self._copy = HostCopy(torch.cat([self._drawn.double(), *tables]) if tables else self._drawn)

    @property
    def tokens(self) -> Tensor:
        return self._drawn.clamp(min=0)

    def result(self) -> list[Drawn]:
        copied, at = self._copy.wait(), len(self._drawn)
        if len(copied) == at:
            return [(token, None) for token in copied.tolist()]
        flat: NDArray[np.float64] = copied.numpy()
        tokens = flat[:at].astype(np.int64).tolist()
        found: list[Logprobs | None] = [None] * at
        first = 0
        for launched in self._launches:
            for scored in launched.scored:
                table = flat[at : at + scored.table.numel()].reshape(scored.table.shape)
                for row, width, told in zip(scored.rows, scored.widths, table, strict=True):
                    found[first + row] = _one(told[None], width)
                at += scored.table.numel()
            first += len(launched.tokens)
        return list(zip(tokens, found, strict=True))


def _one(table: NDArray[np.float64], width: int) -> Logprobs | None:
    """One row of a table that may be wider."""
    widest = (table.shape[1] - 3) // 2
    top = 3 + widest
    return pack(np.concatenate([table[:, : 3 + width], table[:, top : top + width]], axis=1), width)


class HostCopy:
    """A tensor on its way to the host: from a GPU without holding up the thread that asked for it."""

    def __init__(self, tensor: Tensor) -> None:
        self._host, self._arrived = tensor, None
        if tensor.device.type == "cuda":
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._arrived = torch.Event(tensor.device)
            self._arrived.record()

    def wait(self) -> Tensor:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host

"""--deterministic: the bits of a request depend on the request alone, not on its batch mates or its chunks.

Products, norms and activations round differently in batches of different shapes. So a step is run as forwards of one
fixed shape: ``rows`` packed rows, all under the same adapters, padded with rows of a sequence of no importance.
Attention has a body of its own (kernels/attention_blocks.py), and low rank the plain one, which sees one segment.

What is left is the place of a row among the others. For each set of adapters a trial says, before it is first used,
whether places and neighbours are indifferent: rows of equal content must have equal bits everywhere, whatever the
neighbours. Where they are not (a kernel that treats its last rows otherwise, experts that gather rows), each row gets
a forward of its own, in the first place.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Rows
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from onebase.adapters.tiers.entry import Entry
from onebase.kernels.instructions import InstructionTable
from onebase.kernels.plan import BatchPlan, PlanCache, Run, Uses
from onebase.serve.engine import classes
from onebase.serve.engine.chunk import Chunk
from onebase.serve.engine.inputs import Unseen
from onebase.serve.engine.layout import Layout, Span
from onebase.serve.engine.messages import AdapterUse, Request, SamplingParams
from onebase.serve.engine.pooling import pool_rows, wants_rows
from onebase.serve.engine.prompts import merge, score_prompts, wants_scores
from onebase.serve.engine.runner import ModelRunner
from onebase.serve.engine.sequence import Sequence
from onebase.serve.model.loader import LoadedModel
from onebase.serve.model.site_context import StepPlans

MOST_ROWS = 16  # of a forward: a decode step reads the weights once for as many sequences
SCRATCH_PAGES = MOST_ROWS  # beyond the allocator's pages, for rows of no importance
_TRIALS = 4
_PLANS = 256
_REMEMBERED = 4096

Adapters = tuple[tuple[Entry, AdapterUse, bool], ...]  # those that act on a row; see Sequence.acting_at


@dataclass(frozen=True, slots=True)
class _Piece:
    """Consecutive slots [start, stop) of a sequence under the same adapters. samples: a token is drawn after it."""

    sequence: Sequence
    start: int
    stop: int
    samples: bool

    @property
    def adapters(self) -> Adapters:
        return tuple(self.sequence.acting_at(self.start)) if self.sequence.adapters else ()


class DeterministicRunner(ModelRunner):
    """Runs a step in forwards of fixed shape. The attention context holds SCRATCH_PAGES beyond the allocator's."""

    def __init__(
        self, base: LoadedModel, plans: StepPlans, instructions: InstructionTable, num_pages: int, max_model_len: int
    ) -> None:
        super().__init__(base, plans, instructions)
        self._cache = PlanCache(_PLANS)
        self.rows = min(MOST_ROWS, max_model_len)
        self._scratch = range(num_pages, num_pages + self.rows)
        self._max_model_len = max_model_len
        self._indifferent: dict[tuple[tuple[str, float, bool], ...], bool] = {}

    @torch.inference_mode()
    def forward(self, chunks: Rows[Chunk], unseen: Unseen | None = None) -> Tensor | None:
        """See ModelRunner.forward; all tokens must be known to the host."""
        if unseen is not None:
            raise ValueError("unseen: a deterministic step starts from tokens that the host knows")
        self.scores, self.classes = {}, {}
        found: dict[str, Tensor] = {}
        computed = {chunk.sequence.id: chunk.sequence.num_computed for chunk in chunks}
        try:
            for wave in _waves(chunks):
                for block in self._blocks(wave):
                    found |= self._run_block(block)
        finally:
            for chunk in chunks:
                chunk.sequence.num_computed = computed[chunk.sequence.id]
        rows = [found[chunk.sequence.id] for chunk in chunks if chunk.samples]
        return torch.cat(rows) if rows else None

    def _blocks(self, pieces: Rows[_Piece]) -> Iterator[list[_Piece]]:
        """Pieces of the same adapters, cut and put together to no more rows than a forward has."""
        groups: dict[Uses, list[_Piece]] = {}
        for piece in pieces:
            groups.setdefault(piece.sequence.uses_at(piece.start), []).append(piece)
        for group in groups.values():
            size = self.rows if self._is_indifferent(group[0].adapters) else 1
            yield from _filled(group, size)

    def _run_block(self, block: Rows[_Piece]) -> dict[str, Tensor]:
        """One forward. Logits [1, vocabulary] by request, for the pieces that sample."""
        chunks = []
        for piece in block:
            piece.sequence.num_computed = piece.start
            chunks.append(Chunk(piece.sequence, piece.stop - piece.start, piece.samples))
        scored = [chunk for chunk in chunks if wants_scores(chunk)]
        read = any(classes.wants_classes(chunk) or wants_rows(chunk) for chunk in chunks)
        with self._trunk.recording(read) as recorded:
            logits = self._padded(chunks, block[0].adapters, wanted=bool(scored) or any(p.samples for p in block))
        for hidden in recorded:
            classes.merge(self.classes, classes.classify(chunks, hidden[0][0], at_once=1))
            pool_rows(chunks, hidden[0][0], one_by_one=True)
        if scored:
            merge(self.scores, score_prompts(chunks, lambda rows, uses: logits[list(rows)], self._base.vocab_size, 1))
        ends = np.cumsum([chunk.num_tokens for chunk in chunks])
        return {c.sequence.id: logits[end - 1 : end].clone() for c, end in zip(chunks, ends, strict=True) if c.samples}

    def _padded(self, chunks: Rows[Chunk], adapters: Adapters, *, wanted: bool) -> Tensor:
        """Logits of all rows of a forward, the padding's too; of one row where none is wanted."""
        missing = self.rows - sum(chunk.num_tokens for chunk in chunks)
        padding = _stand_in(0, [0] * missing, 0, self._scratch[-1], adapters)
        padding.pages = list(self._scratch)
        whole = [*chunks, Chunk(padding, missing, samples=False)] if missing else chunks
        uses = whole[0].sequence.uses_at(whole[0].start)
        keep = np.arange(self.rows) if wanted else np.zeros(1, dtype=np.int64)
        return self._run(whole, keep, [(len(keep), uses)])

    def _plan(self, runs: list[Run]) -> BatchPlan | None:
        """One segment for each adapter, however the rows are cut into sequences."""
        return super()._plan([(sum(length for length, _ in runs), runs[0][1])])

    def _is_indifferent(self, adapters: Adapters) -> bool:
        key = tuple((use.digest, use.scale, at_end) for _, use, at_end in adapters)
        if key not in self._indifferent:
            if len(self._indifferent) >= _REMEMBERED:
                self._indifferent.clear()
            self._indifferent[key] = self._try_places(adapters)
        return self._indifferent[key]

    def _try_places(self, adapters: Adapters) -> bool:
        """Whether a row has the same bits in every place, among equals and among others."""
        tokens = [(7 + 31 * place) % self._base.vocab_size for place in range(self.rows)]
        mixed = self._trial(tokens, adapters)
        for place in range(0, self.rows, max(1, self.rows // _TRIALS)):
            equal = self._trial([tokens[place]] * self.rows, adapters, place)
            if not (torch.equal(equal, equal[:1].expand_as(equal)) and torch.equal(equal[place], mixed[place])):
                return False
        return True

    def _trial(self, tokens: Rows[int], adapters: Adapters, place: int | None = None) -> Tensor:
        """Logits of one token a row, each in a sequence of its own. The positions follow from the place, so that what
        depends on them is not trivial; ``place``: all rows have this one's."""
        places = range(self.rows) if place is None else [place] * self.rows
        positions = [(11 + 3 * at) % self._max_model_len for at in places]
        stand_ins = [
            _stand_in(at, [token], position, page, adapters)
            for at, (token, position, page) in enumerate(zip(tokens, positions, self._scratch, strict=True))
        ]
        return self._padded([Chunk(one, 1, samples=True) for one in stand_ins], adapters, wanted=True)


def _waves(chunks: Rows[Chunk]) -> list[list[_Piece]]:
    """The chunks cut where their adapters change. A sequence's pieces are in different waves, in order."""
    waves: list[list[_Piece]] = []
    for chunk in chunks:
        start = chunk.start
        for depth, (length, _) in enumerate(chunk.sequence.runs(chunk.start, chunk.stop)):
            if depth == len(waves):
                waves.append([])
            stop = start + length
            waves[depth].append(_Piece(chunk.sequence, start, stop, chunk.samples and stop == chunk.stop))
            start = stop
    return waves


def _filled(pieces: Rows[_Piece], size: int) -> Iterator[list[_Piece]]:
    """Blocks of up to ``size`` rows, all full but the last."""
    block: list[_Piece] = []
    room = size
    for whole in pieces:
        start = whole.start
        while start < whole.stop:
            stop = min(whole.stop, start + room)
            block.append(replace(whole, start=start, stop=stop, samples=whole.samples and stop == whole.stop))
            room -= stop - start
            start = stop
            if not room:
                yield block
                block, room = [], size
    if block:
        yield block


def _stand_in(number: int, tokens: list[int], position: int, page: int, adapters: Adapters) -> Sequence:
    """A sequence of no importance under these adapters, whose first token has this position."""
    uses = tuple(use for _, use, _ in adapters)
    request = Request(f"stand-in {number}", tuple(tokens), SamplingParams(), uses)
    sequence = Sequence.of(request, number)
    sequence.lay_out(Layout(first_position=position, spans=tuple((Span(0, at_end=at_end),) for *_, at_end in adapters)))
    sequence.adapters = tuple(entry for entry, *_ in adapters)
    sequence.pages = [page]
    return sequence

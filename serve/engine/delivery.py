"""What a step's results become: tokens of their sequences, ends, and outputs for the API side."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice

from onebase.adapters.errors import EngineError, OneBaseError, RequestRejected
from onebase.serve.engine.chunk import Chunk
from onebase.serve.engine.classes import Classes
from onebase.serve.engine.commands import failure
from onebase.serve.engine.draw import Drawn
from onebase.serve.engine.grammar import Matcher
from onebase.serve.engine.greedy import NOT_FINITE
from onebase.serve.engine.messages import ClassLogits, Failure, Logprobs, TokenOutput
from onebase.serve.engine.prompts import Scores
from onebase.serve.engine.sequence import Sequence, Status
from onebase.serve.engine.stats import Counters

Told = TokenOutput | Failure
End = Callable[[Sequence], None]  # takes a sequence out of the engine and frees all it holds
_OVERFLOW = "the model's logits are not finite: its weights or the adapter's overflow"


class Delivery:
    """Sequences that have ended since the step was launched (aborted, refused) are passed over."""

    def __init__(self, counters: Counters, end: End) -> None:
        self._counters = counters
        self._end = end

    def prompts(self, chunks: Iterable[Chunk], scores: Scores, classes: Classes) -> list[Told]:
        """What was asked for of the prompts' tokens in a step, by request."""
        told: list[Told] = []
        for chunk in chunks if scores or classes else ():
            name = chunk.sequence.id
            if name in scores and chunk.sequence.status is not Status.FINISHED:
                told.append(self._scores(chunk, scores[name]))
            if name in classes and chunk.sequence.status is not Status.FINISHED:
                told.append(self._classes(chunk, classes[name]))
        return told

    def _scores(self, chunk: Chunk, scores: Logprobs | None) -> Told:
        """Log-probabilities of the prompt's tokens in a chunk; None where they are not finite."""
        sequence = chunk.sequence
        if scores is None:
            return self._overflowed(sequence)
        computed = sequence.prompt_tokens(0, chunk.stop)
        sequence.num_scored = min(computed, len(sequence.request.prompt) - 1)
        return TokenOutput(sequence.id, (), prompt_logprobs=scores)

    def _classes(self, chunk: Chunk, classes: ClassLogits | None) -> Told:
        """What a head said of a chunk; None where it is not finite."""
        sequence = chunk.sequence
        if classes is None:
            return self._overflowed(sequence)
        left = sequence.unclassified
        sequence.unclassified = range(max(left.start, min(chunk.stop, left.stop)), left.stop)
        return TokenOutput(sequence.id, (), classes=classes)

    def tokens(self, chunks: Iterable[Chunk], drawn: Iterable[Drawn]) -> list[Told]:
        """The tokens that were drawn, num_draws of them for each chunk."""
        told: list[Told] = []
        rows = iter(drawn)
        for chunk in chunks:
            first = next(rows)
            more = list(islice(rows, len(chunk.drafts))) if chunk.drafts else ()
            if chunk.sequence.status is Status.FINISHED:
                continue
            if chunk.drafts:
                told += self._verified(chunk, [first, *more])
            else:
                told.append(self._token(chunk.sequence, *first))
        return told

    def _verified(self, chunk: Chunk, drawn: list[Drawn]) -> list[Told]:
        """The first token, and after each draft that was right the next one. What was computed of those stays."""
        told: list[Told] = []
        for (token, logprobs), draft in zip(drawn, (*chunk.drafts, None), strict=True):
            told.append(self._token(chunk.sequence, token, logprobs))
            if token != draft or chunk.sequence.status is Status.FINISHED:
                break
            chunk.sequence.num_computed += 1
            self._counters.accepted_tokens += 1
        return told

    def _token(self, sequence: Sequence, token: int, logprobs: Logprobs | None) -> Told:
        sequence.num_unseen = 0
        if token == NOT_FINITE:
            return self._overflowed(sequence)
        tokens, cached = sequence.tokens, 0
        if len(tokens) == sequence.start_len:  # its first one
            cached = sequence.num_given
            if sequence.request.sampling.max_tokens == 0:
                return self._nothing_generated(sequence, cached)
        if sequence.matcher is not None and not sequence.matcher.accept(token):
            return self._mismatched(sequence, sequence.matcher)
        tokens.append(token)
        self._counters.generated_tokens += 1
        reason = sequence.finish_reason()
        if reason is not None:
            self._end(sequence)
        return TokenOutput(sequence.id, (token,), reason, logprobs, None, cached)

    def _nothing_generated(self, sequence: Sequence, cached: int) -> Told:
        embedding = None if sequence.pool is None else sequence.pool.vector()
        if sequence.request.embeds and embedding is None:
            return self._overflowed(sequence)
        self._end(sequence)
        return TokenOutput(sequence.id, (), "length", cached_tokens=cached, embedding=embedding)

    def failed(self, sequence: Sequence, error: OneBaseError) -> Failure:
        """The sequence cannot go on."""
        self._end(sequence)
        return failure(sequence.id, error)

    def _mismatched(self, sequence: Sequence, matcher: Matcher) -> Failure:
        message = f"the grammar is too complex to go on with after {sequence.num_generated} tokens: {matcher.error}"
        return self.failed(sequence, RequestRejected(message))

    def _overflowed(self, sequence: Sequence) -> Failure:
        return self.failed(sequence, EngineError(_OVERFLOW))

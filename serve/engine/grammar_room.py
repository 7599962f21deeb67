"""Grammars on their way to their sequences: compiled in threads beside the engine's loop, and kept for the next one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock

from onebase.adapters.errors import EngineError, OneBaseError, RequestRejected
from onebase.serve.engine.deep_threads import deep_threads
from onebase.serve.engine.fair_queue import FairQueue
from onebase.serve.engine.grammar import Matcher, Vocabulary
from onebase.serve.engine.messages import Grammar
from onebase.serve.engine.sequence import Sequence, Status
from onebase.serve.engine.waiting import Refused

COMPILERS = 2
CACHE_BYTES = 256 << 20
_LEAST_BYTES, _BYTES_PER_CHARACTER = 64 << 10, 200  # what a compiled grammar takes, about

Open = Callable[[], Vocabulary]  # raises ValueError where the tokenizer cannot be read


class GrammarRoom:
    """Sequences that ask for a grammar get their matcher here, by turns among tenants. Used by the engine's thread."""

    def __init__(self, open_vocabulary: Open, ready: Callable[[Sequence], None]) -> None:
        """open_vocabulary: called once, in ``warm_up`` or with the first grammar. ready: told of each sequence that has
        its matcher."""
        self._ready = ready
        self._compiled = CompiledGrammars(open_vocabulary)
        self._threads: ThreadPoolExecutor | None = None
        self._asked: FairQueue[tuple[Grammar, Future[Matcher]]] = FairQueue()
        self._building: dict[Sequence, Future[Matcher]] = {}

    @property
    def busy(self) -> bool:
        """Whether a sequence waits for its matcher."""
        return bool(self._building)

    def warm_up(self) -> None:
        """Read the tokenizer before anybody waits: that holds the GIL. Where it cannot be read, requests say so."""
        self._compiled.open()

    def add(self, sequence: Sequence) -> None:
        """One that is new. It may not start before ``collect`` has given it its matcher."""
        grammar = sequence.request.sampling.grammar
        if grammar is not None:
            self._threads = self._threads or deep_threads(COMPILERS, "grammar")
            future = self._building[sequence] = Future[Matcher]()
            self._asked.put(sequence.request.tenant, (grammar, future))
            self._threads.submit(self._compile_next)

    def collect(self) -> Refused:
        """Hand out the matchers that are there; the sequences whose grammar failed, and why."""
        refused: Refused = []
        for sequence, future in list(self._building.items()):
            if sequence.status is Status.FINISHED:
                future.cancel()
            elif not future.done():
                continue
            elif (error := future.exception()) is None:
                sequence.matcher = future.result()
                self._ready(sequence)
            else:
                refused.append((sequence, _told(error, sequence.request.sampling.grammar)))
            del self._building[sequence]
        return refused

    def _compile_next(self) -> None:
        """In a thread; one call for each that was asked for, whose turn is told only now."""
        grammar, future = self._asked.get()
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(self._compiled.matcher(grammar))
        except BaseException as error:
            future.set_exception(error)

    def close(self) -> None:
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)


def _told(error: BaseException, grammar: Grammar | None) -> OneBaseError:
    """Names the field that the grammar came from."""
    if isinstance(error, RequestRejected) and grammar is not None and grammar.param is not None:
        return RequestRejected(f"{grammar.param}: {error.message}", param=grammar.param)
    if isinstance(error, OneBaseError):
        return error
    return EngineError(f"the grammar could not be compiled: {type(error).__name__}: {error}")


class CompiledGrammars:
    """The latest grammars, compiled: as many as CACHE_BYTES, by an estimate. Used by several threads."""

    def __init__(self, open_vocabulary: Open, capacity: int = CACHE_BYTES) -> None:
        self._open_vocabulary = open_vocabulary
        self._capacity = capacity
        self._vocabulary: Vocabulary | RequestRejected | None = None
        self._opening = Lock()
        self._lock = Lock()
        self._kept: OrderedDict[Grammar, Matcher] = OrderedDict()  # the latest at the end
        self.nbytes = 0

    def __contains__(self, grammar: Grammar) -> bool:
        return grammar in self._kept

    def open(self) -> Vocabulary | RequestRejected:
        with self._opening:
            if self._vocabulary is None:
                self._vocabulary = self._read()
            return self._vocabulary

    def _read(self) -> Vocabulary | RequestRejected:
        try:
            return self._open_vocabulary()
        except Exception as error:  # tokenizers of strangers fail in ways of their own; every request is told
            reason = str(error).strip().partition("\n")[0][:200]
            return RequestRejected(f"this model's tokenizer cannot be used with grammars: {reason}")

    def matcher(self, grammar: Grammar) -> Matcher:
        """A new one, at the start. Blocking. Raises RequestRejected."""
        vocabulary = self.open()
        if isinstance(vocabulary, RequestRejected):
            raise RequestRejected(vocabulary.message)
        with self._lock:
            found = self._kept.get(grammar)
            if found is not None:
                self._kept.move_to_end(grammar)
        if found is None:
            found = vocabulary.compile(grammar)
            self._keep(grammar, found)
        return found.copy()

    def _keep(self, grammar: Grammar, matcher: Matcher) -> None:
        with self._lock:
            if grammar not in self._kept:
                self._kept[grammar] = matcher
                self.nbytes += _estimate(grammar)
            while self.nbytes > self._capacity:
                dropped, _ = self._kept.popitem(last=False)
                self.nbytes -= _estimate(dropped)


def _estimate(grammar: Grammar) -> int:
    return _LEAST_BYTES + _BYTES_PER_CHARACTER * len(grammar.source)

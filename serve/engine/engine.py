"""The engine's loop: schedule -> plan -> forward -> sample -> deliver. Knows nothing of processes or sockets."""

from __future__ import annotations

from functools import partial

from onebase.adapters.errors import OneBaseError, RequestRejected, RequestTimedOut
from onebase.serve.engine.admission import check_request
from onebase.serve.engine.assembly import assemble
from onebase.serve.engine.combine import without_idle
from onebase.serve.engine.commands import AdapterCommands, failure
from onebase.serve.engine.config import EngineConfig, overlaps
from onebase.serve.engine.deadlines import Deadlines
from onebase.serve.engine.delivery import Delivery
from onebase.serve.engine.draw import begin, begin_apart
from onebase.serve.engine.grammar_room import GrammarRoom
from onebase.serve.engine.messages import (
    AdapterGone,
    AdapterReady,
    EngineStats,
    Failure,
    HostChanges,
    LoadAdapter,
    Request,
    SetPins,
    TokenOutput,
    UnloadAdapter,
)
from onebase.serve.engine.pipeline import Pipeline
from onebase.serve.engine.sequence import Sequence, Status
from onebase.serve.engine.speculation import Speculation
from onebase.serve.engine.stats import Counters, engine_stats
from onebase.serve.engine.vocabulary import vocabulary_of
from onebase.serve.engine.waiting import Refused
from onebase.serve.model.loader import LoadedModel, load_model

Output = TokenOutput | Failure | AdapterReady | AdapterGone


class Engine:
    """One base model, its adapters and the sequences being generated. Used by one thread."""

    def __init__(self, config: EngineConfig, base: LoadedModel | None = None) -> None:
        parts = assemble(config, base or load_model(config))
        self.scheduler = parts.scheduler
        self.adapters = parts.adapters
        self.waiting = parts.waiting
        self.budget = parts.budget
        self.runner = parts.runner
        self.info = parts.info
        self.counters = Counters()
        self.grammars = GrammarRoom(partial(vocabulary_of, config, self.info), self.scheduler.waiting.bring_back)
        self.commands = AdapterCommands(self.adapters, self._over, self._refuse)
        self._eos = frozenset(self.info.eos_token_ids)
        self._pipeline = Pipeline(
            self.runner,
            self.scheduler,
            Delivery(self.counters, self._end),
            begin_apart if config.deterministic else begin,
            self.counters,
            speculation=self._speculation(config),
            overlap=overlaps(config, self.info.device),
        )
        self._sequences: dict[str, Sequence] = {}
        self._deadlines = Deadlines()
        self._order = 0

    def _speculation(self, config: EngineConfig) -> Speculation | None:
        """None under --deterministic: its forwards have one shape whatever is drafted, so that drafts gain nothing."""
        if config.speculate == "off" or config.deterministic:
            return None
        return Speculation(config, self.scheduler, self.counters)

    # Requests and commands

    def add(self, request: Request) -> list[Output]:
        """Queue a request. One that can never run is answered with a Failure."""
        try:
            check_request(request, self.info.max_model_len, self.info.vocab_size)
            if request.id in self._sequences:
                raise RequestRejected(f"request id {request.id!r} is in use")
        except OneBaseError as error:
            return [failure(request.id, error)]
        sequence = Sequence.of(without_idle(request), self._order, self._eos, self.info.max_model_len)
        self._order += 1
        self._sequences[request.id] = sequence
        self._deadlines.add(request.id, request.timeout)
        self.scheduler.add(sequence)
        self.waiting.add(sequence)
        self.grammars.add(sequence)
        return []

    def abort(self, request_id: str) -> None:
        """Forget a request and free all it holds at once. Unknown ids are those that just finished."""
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self._end(sequence)

    def load(self, command: LoadAdapter) -> list[Output]:
        """Compile an adapter and make it resident; answered once it is known to be good, at once or by a later step().

        It goes to the device right after, also in the place of adapters that nobody uses or waits for. Where these are
        not enough it goes there with the first request that needs it.
        """
        return [*self.commands.load(command)]

    def unload(self, command: UnloadAdapter) -> list[Output]:
        """Drop an adapter now, or with its last running request; answered, at once or by a later step(), once it is
        gone. With force no request over it goes on."""
        return [*self.commands.unload(command)]

    def set_pins(self, command: SetPins) -> None:
        """These adapters are to be on the device whatever the traffic, and no others."""
        self.commands.set_pins(command)

    # The loop

    @property
    def has_work(self) -> bool:
        return bool(self.scheduler.running or self.scheduler.waiting or self.commands or self._pipeline.busy)

    def step(self) -> list[Output]:
        """Move adapter loads on and run one forward, if there is anything to run."""
        outputs = [*self._refuse(self._expired()), *self._refuse(self.grammars.collect()), *self._poll_adapters()]
        chunks = self.runner.in_adapter_order(
            self.scheduler.schedule(self.waiting.may_start, self._take, self._release)
        )
        if not chunks and not self._pipeline.busy and self.runner.has_spare_work:
            self.runner.do_spare_work()
        return [*outputs, *self._pipeline.step(chunks)]

    def _expired(self) -> Refused:
        """Requests that have waited or run for too long."""
        over = [self._sequences[request_id] for request_id in self._deadlines.expired()]
        return [(sequence, _timed_out(sequence.request)) for sequence in over]

    def _end(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, and free all it holds."""
        del self._sequences[sequence.id]
        self._deadlines.remove(sequence.id)
        self._release(sequence)
        self.scheduler.finish(sequence)
        self.waiting.leave(sequence)

    def _take(self, sequence: Sequence) -> None:
        """Take references on the adapters of a sequence that starts."""
        sequence.adapters = tuple(self.adapters.acquire(digest) for digest in sequence.digests)

    def _release(self, sequence: Sequence) -> None:
        if sequence.status is Status.RUNNING:
            for use in sequence.request.adapters:
                self.adapters.release(use.digest)
        sequence.adapters = ()

    def _poll_adapters(self) -> list[Output]:
        self.budget.step()
        known = self.adapters.collect(self.waiting.wanted)
        outputs: list[Output] = [*self.commands.known(known)]
        for entry in known:
            if entry.error is not None:
                outputs += self._refuse([(sequence, entry.error) for sequence in self.waiting.over(entry.digest)])
        self.waiting.prefetch()
        self.adapters.place(self.waiting.planned, self.waiting.wanted)
        outputs += self._refuse(self.waiting.lay_out(entry.digest for entry in known))
        return [*outputs, *self.commands.gone()]

    def _over(self, digest: str) -> list[Sequence]:
        """The sequences over an adapter, waiting or running."""
        return [sequence for sequence in self._sequences.values() if digest in sequence.digests]

    def _refuse(self, refused: Refused) -> list[Failure]:
        for sequence, _ in refused:
            self._end(sequence)
        return [failure(sequence.id, error) for sequence, error in refused]

    # What it says of itself

    def stats(self) -> EngineStats:
        return engine_stats(self.scheduler, self.adapters, self.budget, self.counters)

    def host_changes(self) -> HostChanges | None:
        """What came to host memory and left it since this was asked last; None where nothing did."""
        added, removed = self.adapters.host.changes()
        return HostChanges(tuple(added), tuple(removed)) if added or removed else None

    def check(self) -> None:
        """Prove that pages, arena bytes and references add up. Raises RuntimeError where they do not."""
        self.scheduler.check()
        self.adapters.check()
        self.budget.check()
        held = sum(len(sequence.digests) for sequence in self.scheduler.running)
        if held != self.adapters.num_references:
            raise RuntimeError(
                f"adapters: running sequences hold {held} references, counted {self.adapters.num_references}"
            )

    def close(self) -> None:
        self.adapters.close()
        self.grammars.close()


def _timed_out(request: Request) -> RequestTimedOut:
    return RequestTimedOut(f"the request did not end within its timeout of {request.timeout:g} s", param="timeout")

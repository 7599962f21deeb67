"""The engine's loop: schedule -> plan -> forward -> sample -> deliver. Knows nothing of processes or sockets."""

from __future__ import annotations

from collections.abc import Iterable

from onebase.adapters.errors import AdapterConflict, AdapterUnloaded, EngineError, OneBaseError, RequestRejected
from onebase.adapters.tiers.entry import Entry, State
from onebase.kernels.instructions import InstructionTable
from onebase.serve.engine.budget import DeviceBudget
from onebase.serve.engine.classes import NO_HEAD
from onebase.serve.engine.combine import without_idle
from onebase.serve.engine.config import EngineConfig
from onebase.serve.engine.deterministic import SCRATCH_PAGES, DeterministicRunner
from onebase.serve.engine.draw import draw, draw_apart
from onebase.serve.engine.memory import allocate, arena_in, plan_memory
from onebase.serve.engine.messages import (
    AdapterGone,
    AdapterReady,
    ClassLogits,
    EngineInfo,
    EngineStats,
    Failure,
    HostChanges,
    LoadAdapter,
    Logprobs,
    Request,
    SetPins,
    TokenOutput,
    UnloadAdapter,
)
from onebase.serve.engine.pages import PageAllocator
from onebase.serve.engine.prefix_cache import PrefixCache
from onebase.serve.engine.runner import ModelRunner
from onebase.serve.engine.sampler import NOT_FINITE
from onebase.serve.engine.scheduler import Chunk, Scheduler
from onebase.serve.engine.sequence import Sequence, Status
from onebase.serve.engine.tier import adapter_tier
from onebase.serve.engine.tier_stats import tier_stats
from onebase.serve.engine.waiting import Refused, WaitingRoom
from onebase.serve.model.loader import LoadedModel, load_model
from onebase.serve.model.sites import StepPlans

Output = TokenOutput | Failure | AdapterReady | AdapterGone


class Engine:
    """One base model, its adapters and the sequences being generated. Used by one thread."""

    def __init__(self, config: EngineConfig, base: LoadedModel | None = None) -> None:
        base = base or load_model(config)
        memory = plan_memory(config, base)
        scratch = SCRATCH_PAGES if config.deterministic else 0
        buffer = allocate(memory, base.device, scratch)
        base.context.lie_in(buffer, memory.num_slots + scratch)
        base.context.warm_up()
        self.max_model_len = memory.max_model_len
        cache = PrefixCache() if config.prefix_caching else None
        pages = PageAllocator(memory.pages.start, config.page_size, cache, first=memory.first_page)
        self.scheduler = Scheduler(pages, config.max_batch_tokens, config.max_num_seqs)
        plans, instructions = StepPlans(), InstructionTable()
        self.adapters = adapter_tier(config, base, arena_in(buffer, memory, base.dtype), plans, instructions)
        pad, lookahead = base.config.get("pad_token_id"), 2 * config.max_num_seqs
        self.waiting = WaitingRoom(self.scheduler, self.adapters, memory.max_model_len, pad, lookahead)
        self.budget = DeviceBudget(memory, self.scheduler, self.adapters, base.context.move_pages, self.waiting)
        self.runner = (
            DeterministicRunner(base, plans, instructions, memory.num_slots, memory.max_model_len)
            if config.deterministic
            else ModelRunner(base, plans, instructions)
        )
        self._draw = draw_apart if config.deterministic else draw
        self.info = EngineInfo(
            architecture=type(base.model).__name__,
            fingerprint=base.fingerprint,
            device=str(base.device),
            dtype=str(base.dtype).removeprefix("torch."),
            vocab_size=base.vocab_size,
            max_model_len=memory.max_model_len,
            page_size=config.page_size,
            num_pages=memory.pages.start,
            adapter_bytes=self.adapters.arena.capacity_bytes,
            eos_token_ids=base.eos_token_ids,
            page_bounds=(memory.pages.least, memory.pages.most),
            adapter_byte_bounds=(memory.adapters.least, memory.adapters.most),
            memory=str(memory),
        )
        self._eos = frozenset(base.eos_token_ids)
        self._sequences: dict[str, Sequence] = {}
        self._leaving: list[AdapterGone] = []  # said once the adapter has left
        self._commands: dict[str, list[str]] = {}  # digest -> ids of LoadAdapter commands that wait for it
        self._order = 0
        self._steps = self._prompt_tokens = self._generated_tokens = 0

    # Requests and commands

    def add(self, request: Request) -> list[Output]:
        """Queue a request. One that can never run is answered with a Failure."""
        try:
            self._validate(request)
        except OneBaseError as error:
            return [_failure(request.id, error)]
        sequence = Sequence.of(without_idle(request), self._order, self._eos)
        self._order += 1
        self._sequences[request.id] = sequence
        self.scheduler.add(sequence)
        self.waiting.add(sequence)
        return []

    def abort(self, request_id: str) -> None:
        """Forget a request and free all it holds at once. Unknown ids are those that just finished."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is not None:
            self._release(sequence)
            self.scheduler.finish(sequence)
            self.waiting.leave(sequence)

    def load(self, command: LoadAdapter) -> list[Output]:
        """Compile an adapter and make it resident; answered once it is known to be good, at once or by a later step().

        It goes to the device right after, also in the place of adapters that nobody uses or waits for. Where these are
        not enough it goes there with the first request that needs it.
        """
        entry = self.adapters.fetch(command.use.digest, command.use.path)
        outputs = self._kept(entry)
        if entry.state is not State.COMPILING:
            return [*outputs, _ready(command.id, entry)]
        self._commands.setdefault(entry.digest, []).append(command.id)
        return outputs

    def _kept(self, entry: Entry) -> list[Output]:
        """An adapter that was to leave stays; whoever waits to see it go is told so."""
        entry.doomed = False
        lost = AdapterConflict("the adapter was loaded while it was being unloaded")
        answers = [answer.id for answer in self._leaving if answer.digest == entry.digest]
        self._leaving = [answer for answer in self._leaving if answer.digest != entry.digest]
        return [_failure(answer, lost) for answer in answers]

    def unload(self, command: UnloadAdapter) -> list[Output]:
        """Drop an adapter now, or with its last running request; answered, at once or by a later step(), once it is
        gone. With force no request over it goes on."""
        lost = AdapterConflict("the adapter was unloaded while it was being loaded")
        outputs: list[Output] = [_failure(waiting, lost) for waiting in self._commands.pop(command.digest, [])]
        over = [s for s in self._sequences.values() if command.force and command.digest in s.digests]
        unloaded = AdapterUnloaded("an adapter of this request was unloaded by force", param="model")
        outputs += self._refuse([(sequence, unloaded) for sequence in over])
        was_resident = self.adapters.unload(command.digest)
        self._leaving.append(AdapterGone(command.id, command.digest, was_resident, len(over)))
        return outputs + self._gone()

    def _gone(self) -> list[Output]:
        """Answers to unloads that have come to their end, one way or the other."""
        outputs: list[Output] = []
        leaving, self._leaving = self._leaving, []
        for answer in leaving:
            still = self.adapters.is_leaving(answer.digest)
            (self._leaving if still else outputs).append(answer)
        return outputs

    def set_pins(self, command: SetPins) -> None:
        """These adapters are to be on the device whatever the traffic, and no others."""
        self.adapters.set_pins({use.digest: use.path for use in command.uses})

    def _validate(self, request: Request) -> None:
        room = self.max_model_len - len(request.prompt)
        needed = min(request.sampling.max_tokens, 1)
        if not request.prompt:
            raise RequestRejected("the prompt has no tokens", param="prompt")
        if room < needed:
            message = f"the prompt has {len(request.prompt)} tokens, the model's context {self.max_model_len}"
            raise RequestRejected(message, param="prompt")
        if (request.classifies or request.embeds) and request.sampling.max_tokens:
            verb = "classifies" if request.classifies else "embeds"
            raise RequestRejected(f"a request that {verb} generates nothing: max_tokens must be 0")
        if request.classifies and not without_idle(request).adapters:
            raise RequestRejected(NO_HEAD, param="model")
        if request.id in self._sequences:
            raise RequestRejected(f"request id {request.id!r} is in use")
        vocab_size = self.info.vocab_size
        if not all(0 <= token < vocab_size for token in request.prompt):
            raise RequestRejected(f"prompt: token ids must be from 0 to {vocab_size - 1}", param="prompt")

    # The loop

    @property
    def has_work(self) -> bool:
        return bool(self.scheduler.running or self.scheduler.waiting or self._commands or self._leaving)

    def step(self) -> list[Output]:
        """Move adapter loads on and run one forward, if there is anything to run."""
        outputs = self._poll_adapters()
        chunks = self.runner.in_adapter_order(
            self.scheduler.schedule(self.waiting.may_start, self._take, self._release)
        )
        if not chunks:
            return outputs
        self._steps += 1
        logits = self.runner.forward(chunks)
        sampling = [chunk.sequence for chunk in chunks if chunk.samples]
        drawn = [] if logits is None else self._draw(logits, sampling)
        self._account(chunks)
        for sequence in [chunk.sequence for chunk in chunks if chunk.sequence.id in self.runner.scores]:
            outputs.append(self._deliver_scores(sequence, self.runner.scores[sequence.id]))
        for sequence in [chunk.sequence for chunk in chunks if chunk.sequence.id in self.runner.classes]:
            if sequence.id in self._sequences:
                outputs.append(self._deliver_classes(sequence, self.runner.classes[sequence.id]))
        for sequence, (token, logprobs) in zip(sampling, drawn, strict=True):
            if sequence.id in self._sequences:
                outputs.append(self._deliver(sequence, token, logprobs))
        return outputs

    def _account(self, chunks: Iterable[Chunk]) -> None:
        for chunk in chunks:
            sequence = chunk.sequence
            self._prompt_tokens += sequence.prompt_tokens(chunk.start, chunk.stop)
            self.scheduler.computed(chunk)

    def _deliver_scores(self, sequence: Sequence, scores: Logprobs | None) -> Output:
        if scores is None:
            return self._overflowed(sequence)
        computed = sequence.prompt_tokens(0, sequence.num_computed)
        sequence.num_scored = min(computed, len(sequence.request.prompt) - 1)
        return TokenOutput(sequence.id, (), prompt_logprobs=scores)

    def _deliver_classes(self, sequence: Sequence, classes: ClassLogits | None) -> Output:
        if classes is None:
            return self._overflowed(sequence)
        left = sequence.unclassified
        sequence.unclassified = range(max(left.start, min(sequence.num_computed, left.stop)), left.stop)
        return TokenOutput(sequence.id, (), classes=classes)

    def _deliver(self, sequence: Sequence, token: int, logprobs: Logprobs | None) -> Output:
        if token == NOT_FINITE:
            return self._overflowed(sequence)
        cached = sequence.num_cached_prompt if sequence.num_cached and not sequence.num_generated else 0
        if sequence.request.sampling.max_tokens == 0:
            embedding = None if sequence.pool is None else sequence.pool.vector()
            if sequence.request.embeds and embedding is None:
                return self._overflowed(sequence)
            self.abort(sequence.id)
            return TokenOutput(sequence.id, (), "length", cached_tokens=cached, embedding=embedding)
        sequence.tokens.append(token)
        self._generated_tokens += 1
        reason = sequence.finish_reason(self.max_model_len)
        if reason is not None:
            self.abort(sequence.id)
        return TokenOutput(sequence.id, (token,), reason, logprobs, cached_tokens=cached)

    def _overflowed(self, sequence: Sequence) -> Output:
        self.abort(sequence.id)
        message = "the model's logits are not finite: its weights or the adapter's overflow"
        return _failure(sequence.id, EngineError(message))

    def _take(self, sequence: Sequence) -> None:
        """Take references on the adapters of a sequence that starts."""
        sequence.adapters = tuple(self.adapters.acquire(digest) for digest in sequence.digests)

    def _release(self, sequence: Sequence) -> None:
        if sequence.status is Status.RUNNING:
            for use in sequence.request.adapters:
                self.adapters.release(use.digest)
        sequence.adapters = ()

    def _poll_adapters(self) -> list[Output]:
        outputs: list[Output] = []
        self.budget.step()
        known = self.adapters.collect(self.waiting.wanted)
        for entry in known:
            for command in self._commands.pop(entry.digest, []):
                outputs.append(_failure(command, entry.error) if entry.error else _ready(command, entry))
            if entry.error is not None:
                outputs += self._refuse([(sequence, entry.error) for sequence in self.waiting.over(entry.digest)])
        self.waiting.prefetch()
        self.adapters.place(self.waiting.planned, self.waiting.wanted)
        outputs += self._refuse(self.waiting.lay_out(entry.digest for entry in known))
        return outputs + self._gone()

    def _refuse(self, refused: Refused) -> list[Output]:
        for sequence, _ in refused:
            self.abort(sequence.id)
        return [_failure(sequence.id, error) for sequence, error in refused]

    # What it says of itself

    def stats(self) -> EngineStats:
        resident = self.adapters.resident()
        waiting = self.scheduler.waiting
        return EngineStats(
            running=len(self.scheduler.running),
            waiting=len(waiting),
            waiting_for_adapter=sum(1 for s in waiting if any(digest not in resident for digest in s.digests)),
            free_pages=self.scheduler.pages.num_free,
            cached_pages=self.scheduler.pages.num_idle,
            page_evictions=self.scheduler.pages.num_evicted,
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            queried_tokens=self.scheduler.queried_tokens,
            cached_tokens=self.scheduler.cached_tokens,
            generated_tokens=self._generated_tokens,
            preemptions=self.scheduler.preemptions,
            num_pages=self.scheduler.pages.num_pages,
            adapter_bytes=self.adapters.arena.capacity_bytes,
            budget_moves=self.budget.moves,
            adapter_bytes_used=self.adapters.arena.used_bytes,
            adapter_loads=self.adapters.transit.loads,
            adapter_evictions=self.adapters.device.evictions,
            resident=resident,
            running_adapters=_distinct(self.scheduler.running),
            waiting_adapters=_distinct(waiting),
            **tier_stats(self.adapters),
        )

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


def _distinct(sequences: Iterable[Sequence]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(digest for sequence in sequences for digest in sequence.digests))


def _ready(command_id: str, entry: Entry) -> AdapterReady:
    return AdapterReady(command_id, entry.digest, entry.family, entry.rank, entry.nbytes, entry.sites)


def _failure(request_id: str, error: OneBaseError) -> Failure:
    return Failure(request_id, type(error).__name__, error.message, error.param)

"""Random schedules over every kind of adapter: whatever happens beside a request, it gets the answer it has alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onebase.adapters.program import LowRank, SiteOps, Window
from onebase.kernels.ops.bottleneck import BlockBottleneck, OutputBottleneck
from onebase.kernels.ops.norm import NormOverride
from onebase.kernels.ops.prefix import GatedPrefix, KvPrefix
from onebase.kernels.ops.reft import Intervention
from onebase.kernels.ops.tokens import SoftPrompt, TokenRows
from onebase.kernels.ops.vector import ScaleIn, ScaleOut
from onebase.serve.engine import assembly
from onebase.serve.engine.config import GIB
from onebase.serve.engine.logprobs import unpack
from onebase.serve.engine.messages import AdapterGone, Failure, Request, SamplingParams, TokenOutput, UnloadAdapter
from onebase.serve.engine.recovery import TokenLimit
from onebase.serve.engine.usage import Usage

from .programs import Programs
from .twins import hold_twins

HIDDEN, INNER, HEADS, HEAD = 64, 96, 2, 16
INVOCATION = (7, 8)
LAYERS = [f"model.layers.{index}" for index in range(2)]
_draw = torch.Generator().manual_seed(5)


def _normal(*shape: int, std: float = 0.2) -> torch.Tensor:
    return torch.randn(shape, generator=_draw) * std


def _low_rank(*, rank: int) -> dict[str, SiteOps]:
    paths = [f"{layer}.{name}" for layer in LAYERS for name in ("self_attn.q_proj", "self_attn.o_proj")]
    return {path: SiteOps(LowRank(_normal(rank, HIDDEN), _normal(rank, HIDDEN), 1.0)) for path in paths}


def _gains() -> dict[str, SiteOps]:
    down, up = (f"{LAYERS[1]}.mlp.{name}_proj" for name in ("down", "up"))
    return {down: SiteOps(extra=(ScaleIn(_normal(INNER, std=0.5)),)), up: SiteOps(extra=(ScaleOut(_normal(INNER)),))}


def _bottlenecks() -> dict[str, SiteOps]:
    def parts() -> tuple[torch.Tensor, ...]:
        return _normal(4, HIDDEN), _normal(HIDDEN, 4), torch.ones(1)

    block = BlockBottleneck(*parts(), activation="relu", reads="sum")
    return {
        f"{LAYERS[0]}.mlp": SiteOps(extra=(block,)),
        f"{LAYERS[1]}.self_attn.o_proj": SiteOps(extra=(OutputBottleneck(*parts(), activation="tanh"),)),
    }


def _pairs(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    return _normal(length, HEADS, HEAD, std=1.0), _normal(length, HEADS, HEAD, std=1.0)


def _ends() -> dict[str, SiteOps]:
    return {LAYERS[0]: SiteOps(extra=(Intervention(_normal(3, HIDDEN), _normal(3), _normal(3, HIDDEN)),))}


def _rows() -> dict[str, SiteOps]:
    rows = TokenRows(torch.tensor([7, 20, 21], dtype=torch.int32), _normal(3, HIDDEN))
    norm = NormOverride(1 + _normal(HIDDEN, std=0.5))
    return {"model.embed_tokens": SiteOps(extra=(rows,)), "model.norm": SiteOps(extra=(norm,))}


KINDS: dict[str, tuple[dict[str, SiteOps], dict[str, Any]]] = {
    "lora": (_low_rank(rank=3), {}),
    "large": (_low_rank(rank=16), {}),
    "alora": (_low_rank(rank=5), {"invocation": INVOCATION}),
    "gains": (_gains(), {}),
    "bottleneck": (_bottlenecks(), {}),
    "rows": (_rows(), {}),
    "ends": (_ends(), {"window": Window(2, 3)}),
    "soft": (
        {"model.embed_tokens": SiteOps(extra=(SoftPrompt(_normal(5, HIDDEN)),))},
        {"num_virtual_tokens": 5, "first_position": 5},
    ),
    "stored": (
        {f"{layer}.self_attn": SiteOps(extra=(KvPrefix(*_pairs(19)),)) for layer in LAYERS},
        {"num_virtual_tokens": 19, "first_position": 19},
    ),
    "gated": ({f"{LAYERS[1]}.self_attn": SiteOps(extra=(GatedPrefix(*_pairs(5), torch.ones(1)),))}, {}),
}
TOGETHER = [("lora", "soft"), ("alora", "stored"), ("gains", "lora", "alora"), ("gated", "rows", "large")]


@dataclass(frozen=True)
class Job:
    """What a client asks for. abort: steps after which it goes away, None where it stays. hasty: it waits no time."""

    prompt: tuple[int, ...]
    adapters: tuple[str, ...]
    scale: float
    max_tokens: int
    temperature: float
    prompt_logprobs: int | None
    abort: int | None
    tenant: str = ""
    priority: int = 0
    hasty: bool = False


@dataclass(frozen=True)
class Answer:
    tokens: list[int]
    prompt: list[float]


class Client:
    """Sends jobs to one engine and collects what comes back."""

    def __init__(self, driver: Any) -> None:
        self.engine, self.made = driver.engine, 0
        self.answers: dict[str, Answer] = {}
        self.left: dict[str, int] = {}  # request -> steps until it is aborted
        self.ended: set[str] = set()
        self.late: set[str] = set()
        self.held = hold_twins(self.engine.runner)
        self._programs = Programs(driver)
        for name, (ops, rest) in KINDS.items():
            self._programs.add(name, ops, **rest)

    def send(self, job: Job, *, to_end: bool = False) -> str:
        self.made += 1
        request_id = f"job-{self.made}"
        scales = [job.scale if name in ("lora", "large", "alora", "gains", "rows") else 1.0 for name in job.adapters]
        uses = tuple(self._programs.use(name, scale) for name, scale in zip(job.adapters, scales, strict=True))
        sampling = SamplingParams(
            job.max_tokens, job.temperature, seed=3, ignore_eos=True, prompt_logprobs=job.prompt_logprobs
        )
        self.answers[request_id] = Answer([], [])
        timeout = 1e-9 if job.hasty and not to_end else None
        request = Request(
            request_id, job.prompt, sampling, uses, tenant=job.tenant, priority=job.priority, timeout=timeout
        )
        assert not self.engine.add(request)
        if job.abort is not None and not to_end:
            self.left[request_id] = job.abort
        return request_id

    def step(self) -> None:
        for request_id in [name for name, steps in self.left.items() if steps == 0]:
            self.engine.abort(request_id)
            del self.left[request_id]
        self.left = {name: steps - 1 for name, steps in self.left.items()}
        for output in self.engine.step():
            if isinstance(output, AdapterGone):
                continue
            if isinstance(output, Failure) and output.kind == "RequestTimedOut":
                self.late.add(output.id)
                continue
            assert not isinstance(output, Failure), output.message
            assert isinstance(output, TokenOutput)
            answer = self.answers[output.id]
            assert output.id not in self.ended
            answer.tokens.extend(output.tokens)
            if output.prompt_logprobs is not None:
                assert not answer.tokens, "the prompt is told before the first token"
                answer.prompt.extend(one.logprob or 0.0 for one in unpack(output.prompt_logprobs))
            if output.finish_reason is not None:
                self.ended.add(output.id)
        self.engine.check()

    def drain(self) -> None:
        for _ in range(20_000):
            if not self.engine.has_work:
                return
            self.step()
            if not self.engine.scheduler.running:
                time.sleep(0.0005)  # an adapter is on its way
        raise AssertionError("the engine did not finish")


class Bench:
    """One crowded engine, and one that serves a job at a time and remembers what it said."""

    def __init__(self, crowded: Client, alone: Client) -> None:
        self.crowded, self.alone = crowded, alone
        self._known: dict[Job, Answer] = {}

    def expected(self, job: Job) -> Answer:
        job = replace(job, tenant="", priority=0)  # who asks changes nothing
        if job not in self._known:
            request_id = self.alone.send(job, to_end=True)
            self.alone.drain()
            self._known[job] = self.alone.answers[request_id]
        return self._known[job]


@pytest.fixture(scope="module")
def bench(make_driver: Callable[..., Any]) -> Bench:
    """The crowded engine has room for a few sequences, and for some of the adapters at a time."""
    crowded = make_driver("llama", max_model_len=72, kv_memory=0.00006, adapter_memory=0.00005, max_num_seqs=6)
    alone = make_driver("llama", max_model_len=72, prefix_caching=False)
    return Bench(Client(crowded), Client(alone))


@pytest.fixture(scope="module")
def moving(make_driver: Callable[..., Any], bench: Bench) -> Bench:
    """An engine as small, where pages and adapters take room from each other; the answers are those of the other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assembly, "measure", lambda config, base: Usage(0, int(0.0003 * GIB), 0, 0))
        driver = make_driver(
            "llama", max_model_len=72, max_num_seqs=6, kv_memory=0.00004, kv_memory_max=1.0, adapter_memory=0.00003,
            adapter_memory_max=1.0, overlap=True,
        )  # fmt: skip
    return Bench(Client(driver), bench.alone)


@pytest.fixture(scope="module")
def overlapped(make_driver: Callable[..., Any], bench: Bench) -> Bench:
    """An engine as small, that delivers a step while the next one runs."""
    driver = make_driver(
        "llama", max_model_len=72, kv_memory=0.00006, adapter_memory=0.00005, max_num_seqs=6, overlap=True
    )
    return Bench(Client(driver), bench.alone)


@pytest.fixture(scope="module")
def speculating(make_driver: Callable[..., Any], bench: Bench) -> Bench:
    """An engine as small, that drafts whatever repeats."""
    driver = make_driver(
        "llama", max_model_len=72, kv_memory=0.00006, adapter_memory=0.00005, max_num_seqs=6, speculate="ngram",
        ngram_min=1, speculative_tokens=5,
    )  # fmt: skip
    return Bench(Client(driver), bench.alone)


@pytest.fixture(scope="module")
def tiered(make_driver: Callable[..., Any], bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """An engine as small, that keeps a few adapters in host memory and the compiled forms of all on disk."""
    driver = make_driver(
        "llama", max_model_len=72, kv_memory=0.00006, adapter_memory=0.00005, max_num_seqs=6, host_cache=0.00003,
        compiled_dir=str(tmp_path_factory.mktemp("compiled")),
    )  # fmt: skip
    return Bench(Client(driver), bench.alone)


_TOKENS = st.sampled_from([20, 21, 22])
_PROMPTS = st.tuples(
    st.integers(0, 20), st.lists(_TOKENS, max_size=6), st.sampled_from([(), INVOCATION]), st.lists(_TOKENS, min_size=1)
).map(lambda parts: (*range(30, 30 + parts[0]), *parts[1], *parts[2], *parts[3][:5]))
JOBS = st.builds(
    Job,
    prompt=_PROMPTS,
    adapters=st.one_of(st.just(()), st.sampled_from([(name,) for name in KINDS]), st.sampled_from(TOGETHER)),
    scale=st.sampled_from([1.0, 0.5]),
    max_tokens=st.sampled_from([0, 1, 3, 14]),
    temperature=st.sampled_from([0.0, 0.0, 1.0]),
    prompt_logprobs=st.sampled_from([None, None, 0]),
    abort=st.sampled_from([None, None, None, 0, 2, 7]),
    tenant=st.sampled_from(["", "a", "b"]),
    priority=st.sampled_from([0, 0, 0, -1, 3]),
    hasty=st.sampled_from([False] * 9 + [True]),
)
# A job and the steps before the next event, or the name of an adapter that is unloaded.
EVENTS = st.lists(
    st.one_of(st.tuples(JOBS, st.integers(0, 3)), st.sampled_from(sorted(KINDS))), min_size=1, max_size=30
)


def _hold(bench: Bench, events: list[tuple[Job, int] | str], max_batch_tokens: int) -> None:
    client, sent = bench.crowded, []
    engine = client.engine
    engine.scheduler.limit = TokenLimit(max_batch_tokens)
    for event in events:
        if isinstance(event, str):
            engine.unload(UnloadAdapter("unload", event))
            continue
        sent.append((client.send(event[0]), event[0]))
        for _ in range(event[1]):
            client.step()
    client.drain()
    for request_id, job in sent:
        if request_id in client.ended:
            answer, expected = client.answers[request_id], bench.expected(job)
            assert answer.tokens == expected.tokens, job
            torch.testing.assert_close(answer.prompt, expected.prompt, atol=1e-4, rtol=0)
        else:
            assert job.abort is not None or (job.hasty and request_id in client.late)
    assert engine.scheduler.pages.num_free == engine.scheduler.pages.num_pages
    assert engine.adapters.num_references == 0


_SCHEDULES = given(events=EVENTS, max_batch_tokens=st.sampled_from([3, 11, 64]))
_CHECKS = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=_CHECKS)
@_SCHEDULES
def test_whatever_happens_beside_it_a_request_has_its_own_answer(
    bench: Bench, events: list[tuple[Job, int] | str], max_batch_tokens: int
) -> None:
    _hold(bench, events, max_batch_tokens)


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=_CHECKS)
@_SCHEDULES
def test_so_it_has_where_a_step_is_delivered_while_the_next_one_runs(
    overlapped: Bench, events: list[tuple[Job, int] | str], max_batch_tokens: int
) -> None:
    _hold(overlapped, events, max_batch_tokens)


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=_CHECKS)
@_SCHEDULES
def test_so_it_has_where_drafts_are_verified(
    speculating: Bench, events: list[tuple[Job, int] | str], max_batch_tokens: int
) -> None:
    _hold(speculating, events, max_batch_tokens)


def test_drafts_are_taken_and_dropped_under_pressure(speculating: Bench) -> None:
    """Else the schedules above prove little."""
    before = speculating.crowded.engine.stats()
    jobs = [Job((30, 31, 20, 21, 20, 21, 20 + turn), (), 1.0, 14, 0.0, None, None) for turn in range(9)]
    _hold(speculating, [(job, 0) for job in jobs], 64)
    after = speculating.crowded.engine.stats()
    assert 0 < after.accepted_tokens - before.accepted_tokens < after.drafted_tokens - before.drafted_tokens


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=_CHECKS)
@_SCHEDULES
def test_so_it_has_while_the_border_between_pages_and_adapters_moves(
    moving: Bench, events: list[tuple[Job, int] | str], max_batch_tokens: int
) -> None:
    _hold(moving, events, max_batch_tokens)


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=_CHECKS)
@_SCHEDULES
def test_so_it_has_from_whichever_tier_its_adapter_comes(
    tiered: Bench, events: list[tuple[Job, int] | str], max_batch_tokens: int
) -> None:
    _hold(tiered, events, max_batch_tokens)


def test_adapters_come_from_every_tier(tiered: Bench) -> None:
    """Else the schedules above prove little."""
    jobs = [Job((30, 31, 20 + turn), (name,), 1.0, 3, 0.0, None, None) for turn in range(4) for name in KINDS]
    _hold(tiered, [(job, 0) for job in jobs], 64)
    stats = tiered.crowded.engine.stats()
    assert min(stats.device.hits, stats.host.hits, stats.disk.hits) > 0
    assert min(stats.device.evictions, stats.host.evictions) > 0
    assert stats.disk.misses <= len(KINDS), "compiled once"


def test_the_border_moves_both_ways_over_held_pages_and_resident_adapters(
    moving: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the schedules above prove little: sequences over the base alone, then adapters, then both."""
    engine, before = moving.crowded.engine, moving.crowded.engine.stats().budget_moves
    copied, numbers = dict[int, int](), [engine.scheduler.pages.num_pages]
    copy, step = engine.budget._copy_pages, moving.crowded.step
    monkeypatch.setattr(engine.budget, "_copy_pages", lambda moves: copied.update(moves) or copy(moves))
    monkeypatch.setattr(moving.crowded, "step", lambda: step() or numbers.append(engine.scheduler.pages.num_pages))
    base = [Job((*range(30, 50), 20 + turn), (), 1.0, 40, 0.0, None, None) for turn in range(12)]
    over = [Job((30, 31, 20 + turn), (name,), 1.0, 3, 0.0, None, None) for turn in range(12) for name in KINDS]
    for jobs in (base, over, base + over, over + base) * 2:
        _hold(moving, [(job, 0) for job in jobs], 64)
    changes = [second - first for first, second in pairwise(numbers)]
    assert min(changes) < 0 < max(changes)
    assert copied, "pages moved while they were held or cached"
    assert engine.stats().budget_moves - before >= sum(change != 0 for change in changes)


def test_the_crowd_preempts_evicts_and_compacts(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the schedules above prove little."""
    placement, moved = bench.crowded.engine.adapters.device.placement, []
    move = placement._move
    monkeypatch.setattr(placement, "_move", lambda block: moved.append(move(block)) or moved[-1])
    prompts = [(*range(30, 50), *INVOCATION, 20 + turn) for turn in range(4)]
    jobs = [Job(prompt, (name,), 1.0, 14, 0.0, None, None) for prompt in prompts for name in KINDS]
    before = bench.crowded.engine.stats()
    _hold(bench, [(job, 0) for job in jobs], 64)
    after = bench.crowded.engine.stats()
    assert after.preemptions > before.preemptions
    assert after.adapter_evictions > before.adapter_evictions
    assert after.page_evictions > before.page_evictions
    assert any(moved)
    answers = {tuple(bench.expected(job).tokens) for job in jobs[: len(KINDS)]}
    assert len(answers) == len(KINDS), "each of them says something of its own"


def test_rows_follow_each_other_in_every_kind(benches: dict[str, Bench]) -> None:
    """Else the schedules above prove little of what is kept between steps."""
    for kind, bench in benches.items():
        before = len(bench.crowded.held)
        jobs = [
            Job((30, 31, 20, 21, 22, 20 + turn), (name,), 1.0, 14, 0.0, None, None)
            for turn in range(2)
            for name in KINDS
        ]
        _hold(bench, [(job, 1) for job in jobs], 64)
        held = bench.crowded.held[before:]
        assert any(held), kind
        assert not all(held), kind


@pytest.fixture(scope="module")
def benches(bench: Bench, moving: Bench, overlapped: Bench, speculating: Bench, tiered: Bench) -> dict[str, Bench]:
    return {"plain": bench, "moving": moving, "overlap": overlapped, "drafts": speculating, "tiers": tiered}


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("kind", ["plain", "moving", "overlap", "drafts", "tiers"])
@settings(max_examples=2000, deadline=None, suppress_health_check=_CHECKS)
@_SCHEDULES
def test_ten_thousand_schedules(
    benches: dict[str, Bench], kind: str, events: list[tuple[Job, int] | str], max_batch_tokens: int
) -> None:
    _hold(benches[kind], events, max_batch_tokens)

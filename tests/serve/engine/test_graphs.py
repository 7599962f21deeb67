"""Decode steps from recordings equal the eager ones, over any schedule. Without a GPU a recording is the body itself,
run again over what the static buffers hold by then: what a CUDA graph does, but for the device.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from onebase.adapters.base import Site
from onebase.adapters.program import LowRank, SiteOps
from onebase.kernels.attention import AttentionBatch, select_attention
from onebase.kernels.dispatch import select_kernels
from onebase.kernels.ops.dense import Dense
from onebase.kernels.ops.rotate import PairRotateOut
from onebase.kernels.ops.vector import ScaleIn, ScaleOut
from onebase.kernels.tables import Operands
from onebase.kernels.touched import Touched
from onebase.serve.engine import assembly, graphs, tier
from onebase.serve.engine.graph_inputs import StaticInputs
from onebase.serve.engine.graphs import Needs, Room, bucket, buckets
from onebase.serve.engine.inputs import StepInputs
from onebase.serve.engine.loop import _patience
from onebase.serve.model import loader

from .programs import PROMPT, Programs, save_lora

needs_interpreter = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="set TRITON_INTERPRET=1 before the run (make test does)"
)
CPU = torch.device("cpu")
_DRAW = torch.Generator().manual_seed(1)
_Q, _UP, _DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=_DRAW)


VECTORS = {
    "scaled": {_DOWN: SiteOps(extra=(ScaleIn(3 * _random(96)),)), _Q: SiteOps(extra=(ScaleOut(3 * _random(64)),))},
    "turned": {
        _Q: SiteOps(LowRank(_random(3, 64), _random(3, 64), 1.0), extra=(PairRotateOut(*_random(2, 64), 16),)),
        _UP: SiteOps(extra=(PairRotateOut(*_random(2, 96), 32),)),
    },
    "plain": {_DOWN: SiteOps(LowRank(_random(3, 96), _random(3, 64), 1.0))},
}


class Replayed:
    """Stands for a captured graph: its output lies in one place, which every replay writes."""

    def __init__(self, body: Callable[[], Tensor]) -> None:
        self._body, self.output = body, body().clone()

    def replay(self) -> None:
        self.output.copy_(self._body())


class StandIn:
    """A recorder. failing: raised by the next recordings."""

    def __init__(self) -> None:
        self.nbytes, self.recorded = 0, 0
        self.failing: Exception | None = None

    def record(self, body: Callable[[], Tensor]) -> Replayed:
        if self.failing is not None:
            raise self.failing
        self.recorded += 1
        return Replayed(body)


@pytest.fixture
def make_graphed(make_driver: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """make_graphed(**options) -> a driver over Triton bodies with graphs, and its recorder."""

    def make(**options: Any) -> tuple[Any, StandIn]:
        monkeypatch.setattr(tier, "select_kernels", partial(select_kernels, choice="triton"))
        monkeypatch.setattr(loader, "select_attention", partial(select_attention, choice="triton"))
        memories: list[Any] = []
        plan = assembly.plan_memory
        monkeypatch.setattr(assembly, "plan_memory", lambda *args: memories.append(plan(*args)) or memories[-1])
        bases: list[Any] = []
        adapt = assembly.adapter_tier
        monkeypatch.setattr(
            assembly, "adapter_tier", lambda c, base, *rest: bases.append(base) or adapt(c, base, *rest)
        )
        driver = make_driver("llama", max_model_len=64, **options)
        recorder = StandIn()
        assembly.use_graphs(driver.engine.runner, bases[0], options.get("max_num_seqs", 64), memories[0], recorder)
        assert driver.engine.runner.graphs is not None
        return driver, recorder

    return make


def _of_queries(sites: list[Site]) -> list[Site]:
    return [site for site in sites if site.path.endswith(("q_proj", "v_proj"))]


@pytest.fixture(scope="module")
def loras(make_driver: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """LoRA folders of several ranks; the last one has q and v alone."""
    sites = make_driver("llama").base_sites()
    of_rank = {2: sites, 5: sites, 17: _of_queries(sites)}
    make = tmp_path_factory.mktemp
    return [save_lora(make("lora"), of_rank[rank], rank, seed) for seed, rank in enumerate(of_rank)]


@needs_interpreter
def test_any_schedule_gives_what_eager_steps_give(
    loras: list[Path],
    make_driver: Callable[..., Any],
    make_graphed: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(graphs, "_OFTEN", 2)
    alone, (driver, _recorder) = make_driver("llama", max_model_len=64), make_graphed(max_num_seqs=4, overlap=True)
    rng = random.Random(3)
    jobs = []
    for _ in range(7):
        uses = rng.choice([(), (loras[0],), (loras[1],), (loras[2],), (loras[0], loras[2])])
        prompt = [rng.randrange(3, 128) for _ in range(rng.choice([1, 5, 11]))]
        jobs.append((prompt, [driver.use(folder, rng.choice([1.0, 0.5])) for folder in uses], rng.choice([3, 6])))
    expected = [alone.generate(prompt, *uses, max_tokens=count) for prompt, uses, count in jobs]
    ids = []
    for prompt, uses, count in jobs:  # they arrive while others run, end and leave rows free
        ids.append(driver.submit(prompt, *uses, max_tokens=count))
        for _ in range(rng.randrange(3)):
            driver.step()
    driver.run()
    assert [driver.outputs[request_id] for request_id in ids] == expected
    assert driver.engine.runner.graphs.replays > 5
    assert len({key[1] for key in driver.engine.runner.graphs._graphs}) > 2, "base and adapter graphs took part"


@needs_interpreter
def test_an_idle_engine_captures_one_graph_a_step_and_then_waits(make_graphed: Callable[..., Any]) -> None:
    driver, recorder = make_graphed(max_num_seqs=4)
    assert _patience(driver.engine) == 0.0
    for captured in (1, 2, 3):
        driver.engine.step()
        assert recorder.recorded == captured
    assert not driver.engine.runner.has_spare_work
    assert _patience(driver.engine) is None
    driver.generate(PROMPT, max_tokens=4)
    assert driver.engine.runner.graphs.replays == 3, "all but the prompt's step"


@needs_interpreter
def test_what_cannot_be_captured_is_tried_once_and_stays_eager(
    make_driver: Callable[..., Any], make_graphed: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    driver, recorder = make_graphed(max_num_seqs=2)
    recorder.failing = RuntimeError("operation not permitted when stream is capturing")
    driver.engine.step()
    assert "stay eager" in caplog.text
    assert "not permitted" in caplog.text
    recorder.failing = None
    assert not driver.engine.runner.has_spare_work, "the others would fail alike"
    assert driver.generate(PROMPT, max_tokens=3) == make_driver("llama").generate(PROMPT, max_tokens=3)
    assert recorder.recorded == driver.engine.runner.graphs.replays == 0


@needs_interpreter
def test_graphs_stop_where_their_memory_ends(make_graphed: Callable[..., Any]) -> None:
    driver, recorder = make_graphed(max_num_seqs=4)
    driver.engine.step()
    recorder.nbytes = graphs.MOST_BYTES
    assert not driver.engine.runner.has_spare_work


@needs_interpreter
def test_a_table_that_grew_gives_its_graphs_up_and_gets_others(
    loras: list[Path], make_graphed: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "_OFTEN", 1)
    driver, recorder = make_graphed(max_num_seqs=1)
    first = driver.generate(PROMPT, driver.use(loras[0]), max_tokens=4)
    before, tables = recorder.recorded, driver.engine.runner.graphs._tables
    for handle in range(1000, 1020):  # more rows than the table had
        tables.install(handle, {0: Operands(0, 1.0, 0, 0)})
    assert driver.generate(PROMPT, driver.use(loras[0]), max_tokens=4) == first
    assert recorder.recorded == before + 1


@needs_interpreter
def test_ranks_beyond_the_configurations_are_replayed(
    make_driver: Callable[..., Any], make_graphed: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(graphs, "_OFTEN", 1)
    folder = save_lora(tmp_path, _of_queries(make_driver("llama").base_sites())[:1], 600, 0)
    alone = make_driver("llama", max_model_len=64)
    driver, recorder = make_graphed(max_num_seqs=1)
    said = driver.generate(PROMPT, driver.use(folder), max_tokens=4)
    assert said == alone.generate(PROMPT, alone.use(folder), max_tokens=4)
    assert driver.engine.runner.graphs.replays == 3
    needs = [key[1] for key in driver.engine.runner.graphs._graphs if key[1].rank]
    assert [(one.rank, one.parts) for one in needs] == [(1024, 64)]
    assert recorder.recorded == len(driver.engine.runner.graphs._graphs), "it was kept"


@needs_interpreter
def test_instructions_outside_the_tables_run_eagerly(
    make_graphed: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "_OFTEN", 1)
    driver, _ = make_graphed(max_num_seqs=1)
    programs = Programs(driver)
    path = "model.layers.1.mlp.down_proj"
    programs.add("dense", {path: SiteOps(extra=(Dense(torch.full((64, 96), 2.0)),))})
    changed = driver.generate(PROMPT, programs.use("dense"), max_tokens=3)
    assert driver.engine.runner.graphs.replays == 0
    assert changed != driver.generate(PROMPT, max_tokens=3)
    assert driver.engine.runner.graphs.replays > 0


@needs_interpreter
def test_vectors_are_replayed_and_stacked_maps_run_eagerly(
    make_driver: Callable[..., Any], make_graphed: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scales of inputs and outputs, and a rotation, alone and beside low rank; then two maps on one row."""
    monkeypatch.setattr(graphs, "_OFTEN", 1)
    answers = []
    for driver in (make_driver("llama", max_model_len=64), make_graphed(max_num_seqs=2)[0]):
        programs = Programs(driver)
        for name, ops in VECTORS.items():
            programs.add(name, ops)
        answers.append([driver.generate(PROMPT, programs.use(name), max_tokens=4) for name in VECTORS])
        replays = 0 if driver.engine.runner.graphs is None else driver.engine.runner.graphs.replays
        answers[-1].append(driver.generate(PROMPT, *map(programs.use, VECTORS), max_tokens=4))
        answers[-1].append(driver.generate(PROMPT, programs.use("turned"), programs.use("plain"), max_tokens=4))
    assert answers[0] == answers[1]
    assert len({str(one) for one in answers[0][:-2]}) == len(VECTORS)
    assert replays == 3 * len(VECTORS) == driver.engine.runner.graphs.replays


def step_of(rows: int, pages: int, at: int) -> StepInputs:
    ids = torch.arange(rows) + at
    tables = [[at + row * pages + page for page in range(pages)] for row in range(rows)]
    batch = AttentionBatch.build([1] * rows, [pages * 4 - 1] * rows, tables, 4, CPU)
    return StepInputs(ids, None, ids + 1, torch.arange(rows), batch, None, None)


def test_rows_that_a_step_lacks_go_to_the_scratch_page() -> None:
    static = StaticInputs(4, 6, 4, 24, 99, CPU, None)
    for rows, pages in ((3, 2), (1, 5), (4, 1), (2, 3)):
        step = step_of(rows, pages, 10 * rows)
        static.fill(step)
        mine, theirs = static.inputs.attention, step.attention
        assert torch.equal(static.inputs.ids[:rows], step.ids)
        assert torch.equal(mine.slots[:rows], theirs.slots)
        assert torch.equal(static.inputs.positions[:rows], step.positions)
        assert torch.equal(mine.block_tables[:rows, :pages], theirs.block_tables)
        assert torch.equal(mine.kv_lens_device[:rows], theirs.kv_lens_device)
        assert set((mine.slots[rows:] // 4).tolist()) <= {99}, "nobody's page"
        assert set(mine.block_tables[rows:, 0].tolist()) <= {99}
        assert set(mine.kv_lens_device[rows:].tolist()) <= {1}
        assert mine.query_starts.tolist() == [0, 1, 2, 3, 4]


def test_buckets_hold_every_number_of_rows() -> None:
    assert [bucket(rows) for rows in (1, 2, 3, 8, 9, 64, 65, 200)] == [1, 2, 4, 8, 16, 64, 80, 208]
    assert buckets(20) == [1, 2, 4, 8, 16]
    for most in (1, 7, 64, 256):
        assert all(any(rows <= have for have in buckets(bucket(most))) for rows in range(1, most + 1))


def test_a_graph_covers_what_needs_no_more() -> None:
    one = Touched(frozenset({1}))
    wide = Needs(Touched(frozenset({1, 2})), 64, 1, 32)
    assert wide.covers(Needs(one, 16, 1, 16))
    assert wide.covers(Needs())
    scaled = replace(one, inputs=one.outputs)
    for needs in (Touched(frozenset({3})), 16, 1), (one, 128, 1), (one, 16, 2), (one, 64, 1, 64), (scaled, 16, 1):
        assert not wide.covers(Needs(*needs))


@pytest.mark.gpu
def test_cuda_graphs_say_what_eager_steps_say(loras: list[Path], make_driver: Callable[..., Any]) -> None:
    options = {"device": "cuda", "dtype": "float32", "max_model_len": 64, "kv_memory": 0.1, "max_num_seqs": 8}
    eager, graphed = (make_driver("llama", **options, cuda_graphs=wanted) for wanted in (False, True))
    assert eager.engine.runner.graphs is None
    for driver in (eager, graphed):
        while driver.engine.runner.has_spare_work:
            driver.engine.step()
        for turn in range(6):
            for folder in (None, *loras):
                driver.submit([5 + turn, 9, 23], *([driver.use(folder)] if folder else []), max_tokens=48)
        driver.run()
    assert graphed.outputs == eager.outputs
    assert graphed.engine.runner.graphs.replays > 0


def test_room_for_pages_is_rounded_up() -> None:
    assert Room(4, 65, 16, 0, CPU).max_pages == 5

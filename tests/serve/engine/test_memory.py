"""The plan of the device's memory: bounds of both sides, and the buffer that they share."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from onebase.adapters.errors import ModelRejected
from onebase.kernels.pages import LayerShape, SlotLayout
from onebase.serve.engine.config import GIB, EngineConfig
from onebase.serve.engine.memory import Bounds, MemoryPlan, allocate, arena_in, plan_memory
from onebase.serve.engine.messages import MemoryRow
from onebase.serve.engine.usage import Usage

CPU = torch.device("cpu")
SLOT = 16384


def _plan(free: float = 8.0, longest: int = 256, **options: Any) -> MemoryPlan:
    """Of a base whose pages take 16 KiB together. free: GiB of the host. longest: its context."""
    shape = LayerShape(4, 32, torch.float32, CPU)
    context = SimpleNamespace(slot_layout=lambda: SlotLayout.of([shape], 16))
    base: Any = SimpleNamespace(context=context, device=CPU, dtype=torch.float32, max_model_len=longest)
    return plan_memory(EngineConfig("m", **options), base, Usage(int(2 * free * GIB), int(free * GIB), GIB, 0))


def _bytes(slots: int) -> float:
    return slots * SLOT / GIB


def test_sizes_without_an_upper_bound_are_fixed() -> None:
    plan = _plan(kv_memory=_bytes(40), adapter_memory=1000 / GIB)
    assert plan.pages == Bounds(40, 40, 40)
    assert plan.adapters == Bounds(1000, 1000, 1000)
    assert (plan.num_slots, plan.first_page, plan.slot_bytes) == (41, 1, SLOT)


def test_one_fixed_size_leaves_nothing_to_move() -> None:
    plan = _plan(kv_memory=_bytes(40))
    assert plan.pages.least == plan.pages.most
    assert plan.adapters.most - plan.adapters.start < SLOT
    plan = _plan(adapter_memory=_bytes(10))
    assert plan.adapters.least == plan.adapters.most
    assert plan.pages.start == plan.pages.most


def test_unset_sizes_start_as_shares_of_the_host_and_keep_a_quarter() -> None:
    plan = _plan(free=1 / 64, max_num_seqs=1024)
    quarter = int(GIB / 64 * 0.25)
    assert plan.adapters.start == quarter
    assert plan.adapters.least == quarter // 4
    assert plan.pages.start == quarter // SLOT
    assert plan.pages.least == plan.pages.start // 4
    assert plan.pages.most == plan.num_slots - plan.adapters.least // SLOT
    assert plan.adapters.most == (plan.num_slots - plan.pages.least) * SLOT


def test_pages_keep_what_the_longest_sequence_needs() -> None:
    plan = _plan(free=1 / 64, longest=3200, max_num_seqs=64)
    assert plan.max_model_len == 3200
    assert plan.pages.least == 200 > plan.pages.start // 4


def test_a_context_that_does_not_fit_is_shortened_to_the_pages_and_these_are_kept() -> None:
    plan = _plan(longest=10_000, kv_memory=_bytes(3), kv_memory_max=_bytes(30), free=_bytes(20))
    assert plan.pages.start == 5
    assert plan.max_model_len == 80
    assert plan.pages.least == 5


def test_no_more_pages_than_all_sequences_can_use() -> None:
    plan = _plan(longest=256, max_num_seqs=2)
    assert plan.pages == Bounds(16, 32, 32)


def test_ranges_bound_both_sides_and_begin_at_their_shares() -> None:
    plan = _plan(
        free=_bytes(400), kv_memory=_bytes(20), kv_memory_max=_bytes(150), adapter_memory=_bytes(10),
        adapter_memory_max=_bytes(60), max_num_seqs=1024,
    )  # fmt: skip
    assert plan.pages == Bounds(20, 100, 150)
    assert plan.adapters == Bounds(10 * SLOT, 60 * SLOT, 60 * SLOT)
    assert plan.num_slots == 160


def test_what_contradicts_itself_is_refused_by_name() -> None:
    for options, param in (
        ({"kv_memory": 2.0, "kv_memory_max": 1.0}, "kv_memory_max"),
        ({"adapter_memory_max": 1.0}, "adapter_memory_max"),
        ({"kv_memory": _bytes(0)}, "kv_memory"),
        ({"kv_memory": _bytes(4), "max_model_len": 256}, "max_model_len"),
    ):
        with pytest.raises(ModelRejected) as caught:
            _plan(**options)  # type: ignore[arg-type]
        assert caught.value.param == param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_arena_and_pages_lie_in_one_buffer_and_do_not_overlap(dtype: torch.dtype) -> None:
    plan = _plan(free=_bytes(64), max_num_seqs=1024)
    buffer = allocate(plan, CPU, spare=3)
    arena = arena_in(buffer, plan, dtype)
    assert buffer.numel() == (plan.num_slots + 3) * SLOT
    assert arena.buffer.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
    assert arena.capacity_bytes == plan.first_page * SLOT
    assert arena.limit_bytes == plan.adapters.most
    arena.buffer[: arena.capacity] = 1
    assert not buffer[plan.first_page * SLOT :].any(), "pages are zeroed"


def test_the_plan_says_where_all_bytes_are() -> None:
    plan = _plan(kv_memory=1.0, adapter_memory=0.5, longest=1 << 20)
    rows = {row.what: row for row in plan.rows()}
    assert rows["kv_pages"] == MemoryRow("kv_pages", GIB, "65536 pages (65536 to 65536)")
    assert str(rows["adapters"]) == "adapters            0.50 GiB  0.50 to 0.50 GiB"
    parts = ("kv_pages", "adapters", "step", "adapters_step", "libraries", "graphs", "left")
    assert sum(rows[part].nbytes for part in parts) == plan.usage.free
    assert rows["total"].nbytes == 16 * GIB


def test_what_steps_take_is_not_given_away() -> None:
    context = SimpleNamespace(slot_layout=lambda: SlotLayout.of([LayerShape(4, 32, torch.float32, CPU)], 16))
    for device, free, share in ((CPU, 6 * GIB, 0.25), (torch.device("cuda"), 5 * GIB, 0.8)):
        base: Any = SimpleNamespace(context=context, device=device, dtype=torch.float32, max_model_len=1 << 20)
        plan = plan_memory(EngineConfig("m"), base, Usage(10 * GIB, 8 * GIB, GIB, GIB, GIB // 2, GIB // 2))
        assert plan.pages.start * SLOT == pytest.approx(free * share, abs=2 * SLOT)


def test_more_than_there_is_is_refused_with_what_to_change() -> None:
    with pytest.raises(ModelRejected) as caught:
        _plan(free=1.0, kv_memory=0.75, adapter_memory=0.5, longest=1 << 20)
    assert caught.value.param == "kv_memory"
    for said in ("1.25 GiB of pages and adapters", "allowed is 1.00 GiB for --kv-memory", "--max-batch-tokens"):
        assert said in caught.value.message
    with pytest.raises(ModelRejected, match=r"allowed is --max-model-len 64, or --kv-memory 0\.001"):
        _plan(kv_memory=_bytes(4), max_model_len=256)


def test_slots_of_layers_that_differ_hold_whole_heads_of_each() -> None:
    """A head's page has a row number in every layer's view, and blocks of any type may end where a slot begins."""
    kinds = [(1, 80, torch.bfloat16), (4, 64, torch.float32), (2, 128, torch.bfloat16)]
    shapes = [LayerShape(*kind, CPU) for kind in kinds]
    layout = SlotLayout.of(shapes, 16)
    assert layout.offsets == (0, 5120, 5120 + 32768)
    assert layout.nbytes >= 5120 + 32768 + 16384
    for shape in shapes:
        assert layout.nbytes % (16 * shape.head_dim * shape.dtype.itemsize) == 0
    assert layout.nbytes % 256 == 0

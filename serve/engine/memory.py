"""How much of the device the pages and the adapters get. One budget: weights + pages + adapters + what steps take.

Pages and adapters lie in one buffer, cut into slots of one KV page of every layer. Adapters have its low end, pages the
rest; what each side has at the start moves later (budget.py), within the bounds that are planned here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from onebase.adapters.errors import ModelRejected
from onebase.adapters.tiers.arena import Arena
from onebase.serve.engine.config import GIB, EngineConfig
from onebase.serve.engine.messages import MemoryRow
from onebase.serve.engine.usage import NOTHING, Usage
from onebase.serve.model.loader import LoadedModel

# Without a budget from the operator: of what is left of a GPU after the weights, and of a host's free memory.
_ADAPTER_SHARE_CUDA = 0.2
_SHARE_CPU = 0.25
_MOST_CPU = 4 * GIB
# Where the operator gives no bounds: what a side keeps of what it has at the start, however short the other one is.
_FLOOR = 0.25
_UNBOUNDED = 1 << 60


@dataclass(frozen=True, slots=True)
class Bounds:
    """What one side has: at least, at the start, at most. Invariant: 0 <= least <= start <= most."""

    least: int
    start: int
    most: int


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """pages: of every layer together. adapters: bytes of the arena. num_slots: all slots of the budget; those that are
    not pages at the start hold the arena."""

    pages: Bounds
    adapters: Bounds
    num_slots: int
    slot_bytes: int
    max_model_len: int
    usage: Usage = NOTHING

    @property
    def first_page(self) -> int:
        """The slot of the first page at the start: how many slots the arena has."""
        return self.num_slots - self.pages.start

    def arena_bytes(self, first_page: int) -> int:
        """Of the arena that ends before this slot."""
        return min(first_page * self.slot_bytes, self.adapters.most)

    def rows(self) -> tuple[MemoryRow, ...]:
        """The whole budget, for people and for metrics."""
        pages, adapters, usage = self.pages, self.adapters, self.usage
        kv, sizes = pages.start * self.slot_bytes, [f"{n / GIB:.2f}" for n in (adapters.least, adapters.most)]
        left = usage.free - usage.working - self.num_slots * self.slot_bytes
        return (
            MemoryRow("weights", usage.weights, "the base model"),
            MemoryRow("kv_pages", kv, f"{pages.start} pages ({pages.least} to {pages.most})"),
            MemoryRow("adapters", adapters.start, f"{sizes[0]} to {sizes[1]} GiB"),
            MemoryRow("step", usage.step, "the largest step, measured"),
            MemoryRow("adapters_step", usage.adapted, "what adapters add to it"),
            MemoryRow("libraries", usage.libraries, "kernels, the allocator's slack"),
            MemoryRow("graphs", usage.graphs, "captured decode steps, at most"),
            MemoryRow("left", max(left, 0), f"of {usage.free / GIB:.2f} GiB free beside the weights"),
            MemoryRow("total", usage.total, "the device, or the container"),
        )


def allocate(plan: MemoryPlan, device: torch.device, spare: int = 0) -> Tensor:
    """The buffer that adapters and pages share: uint8, the plan's slots and ``spare`` ones after them.

    What is pages at the start is zeroed, so that its memory is committed now and not in the middle of serving. On a CPU
    the rest is committed as adapters are loaded."""
    buffer = torch.empty((plan.num_slots + spare) * plan.slot_bytes, dtype=torch.uint8, device=device)
    buffer[plan.first_page * plan.slot_bytes :].zero_()
    return buffer


def arena_in(buffer: Tensor, plan: MemoryPlan, dtype: torch.dtype) -> Arena:
    """The adapters' part of the buffer, at the start."""
    capacity, limit = plan.arena_bytes(plan.first_page), plan.adapters.most
    return Arena.within(buffer.view(dtype), capacity // dtype.itemsize, limit // dtype.itemsize)


def plan_memory(config: EngineConfig, base: LoadedModel, usage: Usage) -> MemoryPlan:
    """Split what is free. Raises ModelRejected where the longest sequence has no room, or bounds contradict."""
    kv_bytes, adapters = _budgets(config, base.device.type, usage)
    slot = base.context.slot_layout().nbytes
    wanted = config.max_num_seqs * -(-base.max_model_len // config.page_size)
    start = min(kv_bytes.start // slot, wanted)
    if start < 1:
        raise ModelRejected(
            f"kv_memory: {kv_bytes.start} bytes hold no page of {slot} bytes; {_remedy(usage)}", param="kv_memory"
        )
    max_model_len = min(base.max_model_len, start * config.page_size)
    if config.max_model_len is not None and max_model_len < config.max_model_len:
        needed = -(-config.max_model_len // config.page_size)
        raise ModelRejected(
            f"max_model_len: {config.max_model_len} tokens need {needed} pages, kv_memory has room for {start}; "
            f"allowed is --max-model-len {max_model_len}, or --kv-memory {_gib(needed * slot)}",
            param="max_model_len",
        )
    longest = -(-max_model_len // config.page_size)
    plan = _plan(kv_bytes, adapters, Bounds(longest, start, wanted), slot, max_model_len, usage)
    _check_fits(plan)
    return plan


def _check_fits(plan: MemoryPlan) -> None:
    """Sizes that the operator gave may be more than there is. Raises ModelRejected."""
    usage, asked = plan.usage, plan.num_slots * plan.slot_bytes
    room = usage.free - usage.working
    if asked > room:
        raise ModelRejected(
            f"kv_memory, adapter_memory: {asked / GIB:.2f} GiB of pages and adapters and {usage.working / GIB:.2f} GiB "
            f"for steps are more than the {usage.free / GIB:.2f} GiB that are free beside the weights; allowed is "
            f"{max(room, 0) / GIB:.2f} GiB for --kv-memory and --adapter-memory together; {_remedy(usage)}",
            param="kv_memory",
        )


def _remedy(usage: Usage) -> str:
    return (
        f"a smaller --max-batch-tokens or --max-num-seqs leaves them more of the {usage.step / GIB:.2f} GiB that the "
        "largest step takes, --kv-dtype fp8_e4m3 halves the pages"
    )


def _gib(nbytes: int) -> str:
    """Rounded up, so that it is enough."""
    return f"{-(-nbytes * 1000 // GIB) / 1000:.3f}"


def _plan(kv_bytes: Bounds, adapters: Bounds, pages: Bounds, slot: int, max_model_len: int, usage: Usage) -> MemoryPlan:
    """pages: what one sequence needs, what there is at the start, and what all sequences together can use."""
    num_slots = pages.start + -(-adapters.start // slot)
    least = max(pages.least, kv_bytes.least * pages.start // kv_bytes.start)
    most = max(pages.start, min(kv_bytes.most // slot, pages.most, num_slots - -(-adapters.least // slot)))
    room = max(adapters.start, min(adapters.most, (num_slots - least) * slot))
    limits = Bounds(least, pages.start, most), Bounds(adapters.least, adapters.start, room)
    return MemoryPlan(*limits, num_slots, slot, max_model_len, usage)


def _budgets(config: EngineConfig, device: str, usage: Usage) -> tuple[Bounds, Bounds]:
    """Bytes of the pages and of the adapters."""
    cuda = device == "cuda"
    spared = usage.total * (1.0 - config.device_memory) if cuda else 0.0
    free = max(int(usage.free - spared) - usage.working, 0)
    most = free if cuda else _MOST_CPU
    share = int(free * (_ADAPTER_SHARE_CUDA if cuda else _SHARE_CPU))
    adapters = _bounds("adapter_memory", config.adapter_memory, config.adapter_memory_max, min(share, most))
    rest = max(free - adapters.start, 0) if cuda else int(free * _SHARE_CPU)
    return _bounds("kv_memory", config.kv_memory, config.kv_memory_max, min(rest, most)), adapters


def _bounds(name: str, least: float | None, most: float | None, otherwise: int) -> Bounds:
    """GIB is a fixed size, GIB to GIB a range; without them the bounds follow from what there is otherwise."""
    if least is None:
        if most is not None:
            raise ModelRejected(f"{name}_max: needs {name}, the lower bound", param=f"{name}_max")
        return Bounds(int(otherwise * _FLOOR), otherwise, _UNBOUNDED)
    low, high = int(least * GIB), int((least if most is None else most) * GIB)
    if high < low:
        raise ModelRejected(f"{name}_max: {most} GiB; allowed is {name} ({least} GiB) and more", param=f"{name}_max")
    return Bounds(low, min(max(otherwise, low), high), high)

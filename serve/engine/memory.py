"""How much of the device the pages and the adapters get. One budget: weights + pages + adapters + headroom.

Pages and adapters lie in one buffer, cut into slots of one KV page of every layer. Adapters have its low end, pages the
rest; what each side has at the start moves later (budget.py), within the bounds that are planned here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor

from onebase.adapters.errors import ModelRejected
from onebase.adapters.tiers.arena import Arena
from onebase.serve.engine.config import GIB, EngineConfig
from onebase.serve.model.loader import LoadedModel

# On CUDA, beside weights, pages and adapters: libraries and the allocator's slack, the logits of every row (in the
# model's type, in float32 and as probabilities), and about this many hidden vectors for each token of a batch.
_SLACK = GIB
_BYTES_PER_LOGIT = 12
_VECTORS_PER_TOKEN = 48
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

    @property
    def first_page(self) -> int:
        """The slot of the first page at the start: how many slots the arena has."""
        return self.num_slots - self.pages.start

    def arena_bytes(self, first_page: int) -> int:
        """Of the arena that ends before this slot."""
        return min(first_page * self.slot_bytes, self.adapters.most)

    def __str__(self) -> str:
        pages, adapters = self.pages, self.adapters
        slot = self.slot_bytes / GIB
        sizes = [f"{n / GIB:.2f}" for n in (adapters.least, adapters.start, adapters.most)]
        return (
            f"device memory: {self.num_slots * slot:.2f} GiB; KV {pages.start * slot:.2f} GiB = {pages.start} pages "
            f"({pages.least} to {pages.most}); adapters {sizes[1]} GiB ({sizes[0]} to {sizes[2]})"
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


def plan_memory(config: EngineConfig, base: LoadedModel) -> MemoryPlan:
    """Split what is free. Raises ModelRejected where the longest sequence has no room, or bounds contradict."""
    kv_bytes, adapters = _budgets(config, base)
    slot = base.context.slot_layout().nbytes
    wanted = config.max_num_seqs * -(-base.max_model_len // config.page_size)
    start = min(kv_bytes.start // slot, wanted)
    if start < 1:
        raise ModelRejected(f"kv_memory: {kv_bytes.start} bytes hold no page of {slot} bytes", param="kv_memory")
    max_model_len = min(base.max_model_len, start * config.page_size)
    if config.max_model_len is not None and max_model_len < config.max_model_len:
        raise ModelRejected(
            f"max_model_len: {config.max_model_len} tokens need {-(-config.max_model_len // config.page_size)} pages, "
            f"kv_memory has room for {start}",
            param="max_model_len",
        )
    longest = -(-max_model_len // config.page_size)
    return _plan(kv_bytes, adapters, Bounds(longest, start, wanted), slot, max_model_len)


def _plan(kv_bytes: Bounds, adapters: Bounds, pages: Bounds, slot: int, max_model_len: int) -> MemoryPlan:
    """pages: what one sequence needs, what there is at the start, and what all sequences together can use."""
    num_slots = pages.start + -(-adapters.start // slot)
    least = max(pages.least, kv_bytes.least * pages.start // kv_bytes.start)
    most = max(pages.start, min(kv_bytes.most // slot, pages.most, num_slots - -(-adapters.least // slot)))
    room = max(adapters.start, min(adapters.most, (num_slots - least) * slot))
    return MemoryPlan(
        Bounds(least, pages.start, most), Bounds(adapters.least, adapters.start, room), num_slots, slot, max_model_len
    )


def _budgets(config: EngineConfig, base: LoadedModel) -> tuple[Bounds, Bounds]:
    """Bytes of the pages and of the adapters."""
    cuda = base.device.type == "cuda"
    free = _free_cuda(config, base) if cuda else free_host()
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


def _free_cuda(config: EngineConfig, base: LoadedModel) -> int:
    free, total = torch.cuda.mem_get_info()
    width: int = base.model.config.get_text_config().hidden_size
    logits = config.max_num_seqs * base.vocab_size * _BYTES_PER_LOGIT
    activations = config.max_batch_tokens * width * base.dtype.itemsize * _VECTORS_PER_TOKEN
    return max(int(free - total * (1.0 - config.device_memory)) - _SLACK - logits - activations, 0)


def free_host(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Free memory of the host, or of the container where that is less."""
    free = int(psutil.virtual_memory().available)
    try:
        most, used = ((cgroup / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return free
    return free if most == "max" else max(min(free, int(most) - int(used)), 0)

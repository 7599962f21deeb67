"""How much of the device the pages and the adapters get. One budget: weights + pages + adapters + headroom."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from onebase.adapters.errors import ModelRejected
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


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """num_pages: KV pages of every layer together; adapter_bytes: size of the arena."""

    num_pages: int
    adapter_bytes: int
    max_model_len: int


def plan_memory(config: EngineConfig, base: LoadedModel) -> MemoryPlan:
    """Split what is free. Raises ModelRejected where not even one page row of the longest sequence fits."""
    kv_bytes, adapter_bytes = _budgets(config, base)
    page = base.context.bytes_per_page()
    wanted = config.max_num_seqs * -(-base.max_model_len // config.page_size)
    num_pages = min(kv_bytes // page, wanted)
    if num_pages < 1:
        raise ModelRejected(f"kv_memory: {kv_bytes} bytes hold no page of {page} bytes", param="kv_memory")
    max_model_len = min(base.max_model_len, num_pages * config.page_size)
    if config.max_model_len is not None and max_model_len < config.max_model_len:
        raise ModelRejected(
            f"max_model_len: {config.max_model_len} tokens need {-(-config.max_model_len // config.page_size)} pages, "
            f"kv_memory has room for {num_pages}",
            param="max_model_len",
        )
    return MemoryPlan(num_pages, adapter_bytes, max_model_len)


def _budgets(config: EngineConfig, base: LoadedModel) -> tuple[int, int]:
    device = base.device
    free = _free_cuda(config, base) if device.type == "cuda" else _free_host()
    adapter_share = _ADAPTER_SHARE_CUDA if device.type == "cuda" else _SHARE_CPU
    most = free if device.type == "cuda" else _MOST_CPU
    adapters = _asked(config.adapter_memory, min(int(free * adapter_share), most))
    rest = free - adapters if device.type == "cuda" else int(free * _SHARE_CPU)
    return _asked(config.kv_memory, min(rest, most)), adapters


def _asked(gib: float | None, otherwise: int) -> int:
    return max(otherwise, 0) if gib is None else int(gib * GIB)


def _free_cuda(config: EngineConfig, base: LoadedModel) -> int:
    free, total = torch.cuda.mem_get_info()
    width: int = base.model.config.get_text_config().hidden_size
    logits = config.max_num_seqs * base.vocab_size * _BYTES_PER_LOGIT
    activations = config.max_batch_tokens * width * base.dtype.itemsize * _VECTORS_PER_TOKEN
    return max(int(free - total * (1.0 - config.device_memory)) - _SLACK - logits - activations, 0)


def _free_host(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Free memory of the host, or of the container where that is less."""
    free = int(psutil.virtual_memory().available)
    try:
        most, used = ((cgroup / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return free
    return free if most == "max" else max(min(free, int(most) - int(used)), 0)

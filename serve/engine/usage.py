"""What the base and its steps take of the device: measured at the start, by running the largest step once.

On a CPU a part of it is run, and its peak grows with the rows: a start must not take minutes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain

import torch

from onebase.adapters.base import SiteKind
from onebase.kernels.attention import AttentionBatch
from onebase.serve.engine.config import GIB, EngineConfig
from onebase.serve.engine.graphs import MOST_BYTES
from onebase.serve.engine.host_memory import HostMemory
from onebase.serve.engine.messages import SamplingParams
from onebase.serve.engine.sampler import sample
from onebase.serve.engine.tensor_peak import TensorPeak
from onebase.serve.model.loader import LoadedModel
from onebase.serve.model.quantised import plain_parts
from onebase.serve.model.sites import ProbedSite

# On CUDA, beside what torch's allocator gave in the step: libraries, kernels, and the allocator's slack.
_LIBRARIES_CUDA = GIB
# What is run on a CPU: about so many operations, within these rows.
_WORK_CPU = 2e10
_ROWS_CPU = range(16, 64)
_MARGIN_CPU = 1.25  # what operators take inside is not seen there
# What adapters add at the widest module of a step: input and output of one more product for each row, in float32.
_BYTES_PER_ADAPTED = 8


@dataclass(frozen=True, slots=True)
class Usage:
    """Bytes of the device once the base is loaded. total: its size, or the container's; free: what nobody has.

    step: what the largest step takes at its peak and gives back; adapted: what adapters add to that; libraries: what
    CUDA's own take; graphs: the most that captured steps keep."""

    total: int
    free: int
    weights: int
    step: int
    adapted: int = 0
    libraries: int = 0
    graphs: int = 0

    @property
    def working(self) -> int:
        """What must be left for steps."""
        return self.step + self.adapted + self.libraries + self.graphs


NOTHING = Usage(0, 0, 0, 0)


def measure(config: EngineConfig, base: LoadedModel) -> Usage:
    """Run the largest step on the base alone, before its pages lie in slots: they are the probe's, and are lost."""
    adapted = config.max_batch_tokens * _widest(base) * _BYTES_PER_ADAPTED
    if base.device.type == "cuda":
        rows = config.max_batch_tokens
        step = _peak_cuda(partial(_run_step, config, base, rows, min(rows, config.max_num_seqs)))
        free, total = torch.cuda.mem_get_info()
        graphs = MOST_BYTES if config.cuda_graphs else 0
        return Usage(total, free, weight_bytes(base), step, adapted, _LIBRARIES_CUDA, graphs)
    step = _step_on_cpu(config, base)
    host = HostMemory.now()
    return Usage(host.total, host.free, weight_bytes(base), step, adapted)


def _peak_cuda(work: Callable[[], None]) -> int:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    peak = int(torch.cuda.max_memory_allocated()) - before
    torch.cuda.empty_cache()
    return peak


def _step_on_cpu(config: EngineConfig, base: LoadedModel) -> int:
    """The peak of the layers or of the drawing, whichever is higher; each from as many rows as are worth it."""
    affordable = int(_WORK_CPU / (2 * sum(s.in_features * s.out_features for s in base.sites.values()) + 1))
    part = max(_ROWS_CPU.start, min(affordable, _ROWS_CPU.stop))
    most = config.max_batch_tokens
    layers, draws = min(most, part), min(most, config.max_num_seqs, part)
    in_layers = _peak(partial(_run_step, config, base, layers, 1)) * most / layers
    in_draws = _peak(partial(_run_step, config, base, draws, draws)) * min(most, config.max_num_seqs) / draws
    return int(max(in_layers, in_draws) * _MARGIN_CPU)


def _peak(work: Callable[[], None]) -> int:
    with TensorPeak() as tensors:
        work()
    most: int = tensors.most
    return most


@torch.inference_mode()
def _run_step(config: EngineConfig, base: LoadedModel, rows: int, asking: int) -> None:
    """Prompts of ``rows`` tokens together, and the dearest way to draw for ``asking`` of the rows. All prompts write to
    one page: nobody reads what they say."""
    longest = base.max_model_len
    lengths = [min(longest, rows - start) for start in range(0, rows, longest)]
    pages = [[0] * -(-length // config.page_size) for length in lengths]
    base.context.batch = AttentionBatch.build(lengths, lengths, pages, config.page_size, base.device)
    logits = base.model(
        input_ids=torch.zeros(1, rows, dtype=torch.int64, device=base.device),
        position_ids=torch.cat([torch.arange(length) for length in lengths]).to(base.device)[None],
        use_cache=False,
        logits_to_keep=torch.arange(asking, device=base.device),
    ).logits[0]
    base.context.batch = None
    sample(logits, [SamplingParams(temperature=1.0, top_p=0.9)] * asking, [0] * asking)


def _widest(base: LoadedModel) -> int:
    return max((max(p.site.in_features, p.site.out_features) for p in base.probed if not _spares_rows(p)), default=0)


def _spares_rows(entry: ProbedSite) -> bool:
    """The head sees only the rows that draw; an embedding's inputs are numbers."""
    return entry.is_head or entry.site.kind is SiteKind.EMBEDDING


def weight_bytes(base: LoadedModel) -> int:
    """Of all parameters and buffers, shared ones once. One on ``meta`` lies elsewhere in another layout, as large."""
    held: dict[object, int] = {}
    for name, tensor in chain(base.model.named_parameters(), base.model.named_buffers()):
        for part in plain_parts(tensor):
            held[name if part.device.type == "meta" else part.data_ptr()] = part.numel() * part.element_size()
    return sum(held.values())

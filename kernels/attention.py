"""Paged attention: one seam, several bodies. Knows nothing of models, requests or page ownership.

Query i of a sequence sits at absolute position ``kv_len - query_len + i``. It sees key j iff ``j <= position`` and,
with a window, ``position - j < window``. Logits are ``scale * q.k``; a soft cap turns them into
``cap * tanh(logits / cap)`` before the mask; a sink adds one logit per head to the softmax's denominator only.
The softmax runs in float32 whatever the input dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from onebase.kernels.native.library import available as native_available
from onebase.kernels.native.library import has_wide_vectors
from onebase.kernels.pages import PageCache

__all__ = ["AttentionBatch", "AttentionBody", "AttentionOptions", "PageCache", "check_shapes", "select_attention"]

Choice = Literal["auto", "reference", "blocks", "cpu", "native", "triton", "measured"]
T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class AttentionBatch:
    """One step's packed tokens, shared by all layers. Build it once a step with ``build``.

    query_lens: new tokens of each sequence, packed one after the other along T = sum(query_lens).
    kv_lens: tokens of each sequence after this step, cached and new.
    slots: int64 [T]; flat slot (page * page_size + offset) where each new token's K and V go.
    block_tables: int32 [num_seqs, max_pages], unused entries 0. query_starts: int32 [num_seqs + 1].
    kv_lens_device: int32 [num_seqs]. host_tables: block_tables on the host. is_fixed: the device's tensors are written
    anew between replays, and the host's lengths are what they may be at most.
    """

    query_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    page_size: int
    slots: Tensor
    block_tables: Tensor
    query_starts: Tensor
    kv_lens_device: Tensor
    host_tables: NDArray[np.int32]
    is_fixed: bool = False
    _scratch: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def build(
        cls,
        query_lens: Sequence[int],
        kv_lens: Sequence[int],
        pages: Sequence[Sequence[int]],
        page_size: int,
        device: torch.device,
    ) -> AttentionBatch:
        """pages: per sequence its page numbers in order, enough for kv_len tokens (further ones are ignored).

        Raises ValueError where lengths do not fit together. One upload; no synchronisation.
        """
        queries, lengths = np.asarray(query_lens, dtype=np.int64), np.asarray(kv_lens, dtype=np.int64)
        _check_lengths(queries, lengths, pages, page_size)
        tables = _block_tables(pages, -(-lengths // page_size))
        starts = np.zeros(len(queries) + 1, dtype=np.int32)
        np.cumsum(queries, out=starts[1:])
        slots = _slots(queries, lengths, starts, tables, page_size)
        uploaded = _upload(slots, starts, lengths.astype(np.int32), tables, device)
        return cls(tuple(queries.tolist()), tuple(lengths.tolist()), page_size, *uploaded, host_tables=tables)

    @property
    def num_tokens(self) -> int:
        return self.slots.shape[0]

    @property
    def num_seqs(self) -> int:
        return len(self.query_lens)

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What a body derives from the batch (indices, masks, tiles): made by the first layer, shared by the others."""
        if key not in self._scratch:
            self._scratch[key] = make()
        value: T = self._scratch[key]
        return value


@dataclass(frozen=True, slots=True, eq=False)
class AttentionOptions:
    """What one layer asks for. window: as transformers' sliding_window; sinks: [num_heads], any float dtype."""

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"window is {self.window}: allowed is None or at least 1")
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap is {self.softcap}: allowed is None or above 0")


class AttentionBody(Protocol):
    """Writes k, v into the pages at ``batch.slots``, then attends causally through the page tables."""

    @property
    def name(self) -> str:
        """The choice that selects this body."""

    @property
    def is_capturable(self) -> bool:
        """Whether a step of one token for each sequence is computed from the batch's device tensors alone, but for its
        longest context: what a CUDA graph may replay over other contents."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, cache: PageCache, batch: AttentionBatch, options: AttentionOptions
    ) -> Tensor:
        """q: [T, heads, head_dim]; k, v: [T, kv_heads, head_dim] in the cache's dtype; all may be strided views.

        Returns [T, heads, head_dim] in q's dtype. heads is a multiple of kv_heads. Raises ValueError on other shapes.
        """

    def warm_up(self, num_heads: int, cache: PageCache, options: AttentionOptions) -> None:
        """Compile what a layer of this kind may need, on pages of its own. Bodies that compile nothing do nothing.

        cache: the layer's; only its shape, dtype and device are used.
        """


def select_attention(device: torch.device, choice: Choice = "auto") -> AttentionBody:
    """The body for a device; auto takes native on a CPU where it is there and the vectors are wide enough for it.
    Raises ValueError where the choice cannot run."""
    if choice == "auto":
        choice = (
            "measured" if device.type == "cuda" else "native" if native_available() and has_wide_vectors() else "cpu"
        )
    if choice == "reference":
        from onebase.kernels.attention_reference import ReferenceAttention

        return ReferenceAttention()
    if choice == "blocks":
        from onebase.kernels.attention_blocks import BlockAttention

        return BlockAttention()
    if choice == "cpu" and device.type == "cpu":
        from onebase.kernels.attention_cpu import CpuAttention

        return CpuAttention()
    if choice == "native" and device.type == "cpu" and native_available():
        from onebase.kernels.attention_native import NativeAttention

        return NativeAttention()
    if choice == "measured" and device.type == "cuda":
        from onebase.kernels.attention_choice import MeasuredAttention

        return MeasuredAttention.on(device)
    if choice == "triton":
        from onebase.kernels.attention_triton import TritonAttention

        return TritonAttention.on(device)
    raise ValueError(
        f"attention {choice!r} cannot run on {device.type}: allowed is reference, blocks, cpu (CPU), native (CPU, with "
        "a compiler), triton, measured (CUDA)"
    )


def check_shapes(
    q: Tensor, k: Tensor, v: Tensor, cache: PageCache, batch: AttentionBatch, options: AttentionOptions
) -> None:
    """Raises ValueError unless q, k, v, the cache, the batch and the sinks fit together."""
    heads, dim = cache.num_kv_heads, cache.head_dim
    if q.dim() != 3 or q.shape[0] != batch.num_tokens or q.shape[2] != dim or q.shape[1] % heads:
        raise ValueError(
            f"q is {list(q.shape)}: allowed is [{batch.num_tokens}, a multiple of {heads}, {dim}] by cache and batch"
        )
    if k.shape != (batch.num_tokens, heads, dim) or v.shape != k.shape:
        raise ValueError(f"k is {list(k.shape)}, v is {list(v.shape)}: allowed is {[batch.num_tokens, heads, dim]}")
    if not q.dtype == k.dtype == v.dtype == cache.dtype:
        raise ValueError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}: allowed is the cache's {cache.dtype}")
    if cache.page_size != batch.page_size:
        raise ValueError(f"page_size is {batch.page_size} in the batch but {cache.page_size} in the cache")
    if options.sinks is not None and options.sinks.shape != q.shape[1:2]:
        raise ValueError(f"sinks is {list(options.sinks.shape)}: allowed is [{q.shape[1]}], one per query head")


def _check_lengths(
    queries: NDArray[np.int64], lengths: NDArray[np.int64], pages: Sequence[Sequence[int]], page_size: int
) -> None:
    if not len(queries) == len(lengths) == len(pages) or len(queries) == 0:
        raise ValueError(
            f"query_lens, kv_lens, pages have {len(queries)}, {len(lengths)}, {len(pages)} entries: "
            "allowed is one each per sequence, and at least one sequence"
        )
    if page_size < 1:
        raise ValueError(f"page_size is {page_size}: allowed is at least 1")
    if bool((queries < 1).any()) or bool((lengths < queries).any()):
        raise ValueError(
            f"query_lens {queries.tolist()}, kv_lens {lengths.tolist()}: allowed is kv_len >= query_len >= 1"
        )
    for held, length in zip(map(len, pages), lengths.tolist(), strict=True):
        if held * page_size < length:
            raise ValueError(f"pages has {held} pages of {page_size} for a sequence of {length} tokens")


def _block_tables(pages: Sequence[Sequence[int]], counts: NDArray[np.int64]) -> NDArray[np.int32]:
    """[num_seqs, max pages needed]; entries past a sequence's need are 0."""
    flat = np.concatenate([row[:count] for row, count in zip(pages, counts.tolist(), strict=True)])
    tables = np.zeros((len(pages), int(counts.max())), dtype=np.int32)
    tables[np.arange(tables.shape[1]) < counts[:, None]] = flat
    return tables


def _slots(
    queries: NDArray[np.int64],
    lengths: NDArray[np.int64],
    starts: NDArray[np.int32],
    tables: NDArray[np.int32],
    page_size: int,
) -> NDArray[np.int64]:
    """Where each new token goes: [T]."""
    sequence = np.repeat(np.arange(len(queries)), queries)
    position = np.arange(starts[-1]) + np.repeat(lengths - queries - starts[:-1], queries)
    page = tables[sequence, position // page_size]
    slots: NDArray[np.int64] = page * np.int64(page_size) + position % page_size
    return slots


def _upload(
    slots: NDArray[np.int64],
    starts: NDArray[np.int32],
    lengths: NDArray[np.int32],
    tables: NDArray[np.int32],
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """slots, block_tables, query_starts, kv_lens on the device, as views of one buffer that travels in one copy."""
    parts = (slots.view(np.int32), starts, lengths, tables.reshape(-1))
    buffer = torch.from_numpy(np.concatenate(parts))
    if device.type == "cuda":
        buffer = buffer.pin_memory()
    on_device = torch.split(buffer.to(device, non_blocking=True), [part.size for part in parts])
    slots_, starts_, lengths_, tables_ = on_device
    return slots_.view(torch.int64), tables_.view(tables.shape), starts_, lengths_

"""The Triton body of paged attention: which tiles and splits a step's kernels (attention_kernels.py) are launched with.

Few rows over long contexts leave most of the device idle: their keys are split over programs, whose partial sums a
second kernel adds up (Flash-Decoding). Grids come from lengths known on the host; nothing waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from onebase.kernels import kv_fp8
from onebase.kernels.attention import AttentionBatch, AttentionOptions, PageCache, check_shapes
from onebase.kernels.attention_kernels import attend_kernel, reduce_kernel, write_kernel
from onebase.kernels.attention_kernels_fp8 import write_fp8
from onebase.kernels.sizes import next_power_of_2

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_SPLITS = 64
SPLITS_AT_ONCE = 16  # that a reduction loads together
INTERPRETER_PROCESSORS = 4


@dataclass(frozen=True, slots=True)
class _Blocks:
    """Tile sizes for one head_dim and dtype, within 96 KiB of shared memory with K and V double-buffered.

    Decoding waits for memory alone: a third stage has the block table's entries fetched ahead of the keys they name.
    """

    m: int
    n: int
    d: int
    warps: int
    stages: int

    @classmethod
    def of(cls, group: int, dim: int, itemsize: int, decode: bool) -> _Blocks:
        d = max(16, next_power_of_2(dim))
        rows, n, stages = {True: (64, 64, 2), False: (32, 32, 1)}[d * itemsize <= 256]
        if d * itemsize > 512:
            rows, n = 32, 16
        m = max(16 if decode else rows, next_power_of_2(group))
        return cls(m, n, d, 4, stages + 1 if decode and stages > 1 else stages)


@dataclass(frozen=True, slots=True, eq=False)
class _Launch:
    """Tiles of one step that run together. tiles: int32 [num_tiles, 2] of (sequence, first query), longest first."""

    tiles: Tensor
    blocks: _Blocks
    splits: int


@dataclass(frozen=True, slots=True)
class TritonAttention:
    """processors: programs the device runs at once. split_tokens: keys below which a split does not pay."""

    processors: int
    split_tokens: int = 256
    name: str = "triton"
    is_capturable: bool = True

    @classmethod
    def on(cls, device: torch.device) -> TritonAttention:
        if device.type == "cuda":
            return cls(torch.cuda.get_device_properties(device).multi_processor_count)
        if isinstance(attend_kernel, JITFunction):
            raise ValueError(f"attention 'triton' on {device.type}: allowed with TRITON_INTERPRET=1 in the environment")
        return cls(INTERPRETER_PROCESSORS)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, cache: PageCache, batch: AttentionBatch, options: AttentionOptions
    ) -> Tensor:
        check_shapes(q, k, v, cache, batch, options)
        if q.dtype not in DTYPES:
            raise ValueError(f"q is {q.dtype}: allowed is {', '.join(map(str, DTYPES))}")
        write_pages(k, v, cache, batch)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        self.attend(q, out, cache, batch, options, range(batch.num_seqs))
        return out

    def attend(
        self,
        q: Tensor,
        out: Tensor,
        cache: PageCache,
        batch: AttentionBatch,
        options: AttentionOptions,
        sequences: Sequence[int],
    ) -> None:
        """Write the rows of these sequences into out [T, heads, head_dim]; their K and V are in the pages."""
        group = q.shape[1] // cache.num_kv_heads
        key = ("triton", group, cache.head_dim, q.dtype, options.window, tuple(sequences))
        for launch in batch.once(key, lambda: self._launches(batch, cache, group, options.window, sequences)):
            _run_attend(q, out, cache, batch, options, launch)

    def warm_up(self, num_heads: int, cache: PageCache, options: AttentionOptions) -> None:
        """A prompt, a decoding row, and one whose keys are split."""
        device, dtype, size = cache.data.device, cache.dtype, cache.page_size
        own = cache.single()
        for queries, length in ((2, 2), (1, 1), (1, 2 * self.split_tokens)):
            batch = AttentionBatch.build([queries], [length], [[0] * -(-length // size)], size, device)
            q = torch.zeros(queries, num_heads, cache.head_dim, dtype=dtype, device=device)
            kv = q[:, : cache.num_kv_heads].contiguous()
            self(q, kv, kv, own, batch, options)

    def _launches(
        self, batch: AttentionBatch, cache: PageCache, group: int, window: int | None, sequences: Sequence[int]
    ) -> list[_Launch]:
        """Decoding rows in small tiles, split where they are few; all others in large tiles."""
        launches = []
        lens, wanted = np.asarray(batch.query_lens), np.asarray(sequences, dtype=np.int64)
        for rows in (wanted[lens[wanted] == 1], wanted[lens[wanted] > 1]):
            if len(rows):
                decode = bool(lens[rows[0]] == 1)
                blocks = _Blocks.of(group, cache.head_dim, cache.dtype.itemsize, decode)
                tiles = _tiles(batch, rows, blocks.m // group)
                longest = max(batch.kv_lens[i] for i in rows)
                keys = min(longest, window) if window else longest
                splits = self._splits(len(tiles) * cache.num_kv_heads, keys) if decode else 1
                launches.append(_Launch(_upload(tiles, batch.slots.device), blocks, splits))
        return launches

    def _splits(self, programs: int, keys: int) -> int:
        """Enough to give each processor two programs, none shorter than split_tokens."""
        return max(1, min(-(-2 * self.processors // programs), keys // self.split_tokens, MAX_SPLITS))


def _tiles(batch: AttentionBatch, rows: np.ndarray, tokens: int) -> np.ndarray:
    lens, ends = np.asarray(batch.query_lens)[rows], np.asarray(batch.kv_lens)[rows]
    counts = -(-lens // tokens)
    first = (np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)) * tokens
    tiles = np.stack([np.repeat(rows, counts), first], axis=1).astype(np.int32)
    return tiles[np.argsort(-(np.repeat(ends - lens, counts) + first), kind="stable")]


def _upload(tiles: np.ndarray, device: torch.device) -> Tensor:
    host = torch.from_numpy(tiles)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def write_pages(k: Tensor, v: Tensor, cache: PageCache, batch: AttentionBatch) -> None:
    """Put k and v [T, kv_heads, head_dim] where the batch says."""
    heads, dim = cache.num_kv_heads, cache.head_dim
    if cache.exponents is not None:
        write_fp8[batch.num_tokens, heads](
            k, v, *_stored(cache), batch.slots, *k.stride(), *v.stride(), *cache.k.stride()[:3],
            DIM=dim, PAGE=cache.page_size, BLOCK=next_power_of_2(dim),
        )  # fmt: skip
        return
    write_kernel[(batch.num_tokens,)](
        k, v, cache.k, cache.v, batch.slots, *k.stride(), *v.stride(), *cache.k.stride(),
        HEADS=heads, DIM=dim, PAGE=cache.page_size, BLOCK=next_power_of_2(heads * dim),
    )  # fmt: skip


def _stored(cache: PageCache) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes of K and V, and their exponents; without fp8 K and V, and nothing that is read."""
    if cache.exponents is None:
        return cache.k, cache.v, cache.k, cache.v
    return cache.k.view(kv_fp8.CODE), cache.v.view(kv_fp8.CODE), cache.exponents[0], cache.exponents[1]


def _run_attend(
    q: Tensor, out: Tensor, cache: PageCache, batch: AttentionBatch, options: AttentionOptions, launch: _Launch
) -> None:
    blocks, heads, dim = launch.blocks, cache.num_kv_heads, cache.head_dim
    programs = (len(launch.tiles), heads, launch.splits)
    size = math.prod(programs) * blocks.m if launch.splits > 1 else 0
    partial = torch.empty(size * dim, dtype=torch.float32, device=q.device)
    stats = torch.empty(2 * size, dtype=torch.float32, device=q.device)
    sinks = options.sinks.contiguous() if options.sinks is not None else q
    shape = {"GROUP": q.shape[1] // heads, "DIM": dim, "BLOCK_M": blocks.m, "BLOCK_D": blocks.d}
    shape["HAS_SINKS"] = options.sinks is not None
    attend_kernel[programs](
        q, *_stored(cache), out, partial, stats,
        batch.block_tables, batch.query_starts, batch.kv_lens_device, launch.tiles, sinks,
        *q.stride(), *cache.k.stride(), out.stride(0), out.stride(1), batch.block_tables.stride(0),
        options.scale, options.softcap or 0.0, options.window or 0,
        **shape, PAGE=cache.page_size, BLOCK_N=blocks.n, HAS_WINDOW=options.window is not None,
        HAS_SOFTCAP=options.softcap is not None,
        SPLIT=launch.splits > 1, FP8=cache.fp8, WIDE=not isinstance(attend_kernel, JITFunction),
        num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
    if launch.splits > 1:
        reduce_kernel[(*programs[:2], shape["GROUP"])](
            partial, stats, out, batch.query_starts, launch.tiles, sinks, out.stride(0), out.stride(1),
            launch.splits, **shape, BLOCK_S=SPLITS_AT_ONCE, num_warps=blocks.warps,
        )  # fmt: skip

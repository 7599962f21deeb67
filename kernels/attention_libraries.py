"""Paged attention through kernels of libraries, where they are there and fit. They write no pages.

Nothing here is trusted: what is used is first compared with the Triton body on the device at hand, at start
(attention_choice.py).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from onebase.kernels.attention import AttentionBatch, AttentionOptions, PageCache

_HALF = (torch.bfloat16, torch.float16)
_WORKSPACE = 128 << 20  # bytes that flashinfer asks for
Kind = tuple[object, ...]


class Library(Protocol):
    """One library. Its errors are the caller's: a library that raises at start is not used."""

    @property
    def name(self) -> str: ...

    def sequences(self, batch: AttentionBatch, cache: PageCache, options: AttentionOptions) -> tuple[int, ...]:
        """Those that it can attend for."""

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, cache: PageCache, batch: AttentionBatch, options: AttentionOptions
    ) -> Tensor:
        """[T, heads, head_dim], right for its ``sequences`` and anything for the others."""


class VarlenPrompts:
    """Prompts from their first token on, by torch.nn.attention.varlen over the step's own K and V.

    Its block tables want pages of 256 tokens in FlashAttention 2 and are not there before torch 2.12; a prompt that
    begins in this step needs none. Nor does every torch share a head of K and V among those of a group: 2.11 has no
    ``enable_gqa``, and gets them repeated.
    """

    name = "varlen"

    def __init__(self, varlen_attn: Callable[..., Any]) -> None:
        self._attend = varlen_attn
        self._takes_groups = _takes(varlen_attn, "enable_gqa")

    @classmethod
    def installed(cls) -> VarlenPrompts:
        """Raises ImportError where torch has none."""
        from torch.nn.attention.varlen import varlen_attn

        return cls(varlen_attn)

    def sequences(self, batch: AttentionBatch, cache: PageCache, options: AttentionOptions) -> tuple[int, ...]:
        if cache.fp8 or cache.dtype not in _HALF or options.softcap is not None or options.sinks is not None:
            return ()
        return batch.once("varlen prompts", lambda: _from_the_start(batch))

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, cache: PageCache, batch: AttentionBatch, options: AttentionOptions
    ) -> Tensor:
        """Rows of other sequences attend to what this step has of them, which is not what they need."""
        starts, longest = batch.query_starts, max(batch.query_lens)
        left = -1 if options.window is None else options.window - 1
        group, grouped = q.shape[1] // k.shape[1], {}
        if group > 1 and self._takes_groups:
            grouped["enable_gqa"] = True
        elif group > 1:
            k, v = (heads.repeat_interleave(group, dim=1) for heads in (k, v))
        found: Tensor = self._attend(
            q, k, v, starts, starts, longest, longest, scale=options.scale, window_size=(left, 0), **grouped
        )
        return found


def _takes(function: Callable[..., Any], name: str) -> bool:
    """Whether a function has an argument of this name."""
    parameters = inspect.signature(function).parameters
    return name in parameters or any(one.kind is one.VAR_KEYWORD for one in parameters.values())


def _from_the_start(batch: AttentionBatch) -> tuple[int, ...]:
    pairs = enumerate(zip(batch.query_lens, batch.kv_lens, strict=True))
    return tuple(at for at, (queries, keys) in pairs if queries == keys > 1)


class FlashInfer:
    """All sequences, over pages of any size, by flashinfer's paged kernels. A plan for each kind of layer and step."""

    name = "flashinfer"

    def __init__(self, device: torch.device, make_wrapper: Callable[..., Any]) -> None:
        self._workspace = torch.empty(_WORKSPACE, dtype=torch.uint8, device=device)
        self._make = make_wrapper
        self._wrappers: dict[Kind, Any] = {}

    @classmethod
    def installed(cls, device: torch.device) -> FlashInfer:
        """Raises ImportError where it is not installed."""
        from flashinfer import BatchPrefillWithPagedKVCacheWrapper

        return cls(device, BatchPrefillWithPagedKVCacheWrapper)

    def sequences(self, batch: AttentionBatch, cache: PageCache, options: AttentionOptions) -> tuple[int, ...]:
        fits = not cache.fp8 and cache.dtype in _HALF and options.sinks is None
        return tuple(range(batch.num_seqs)) if fits else ()

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, cache: PageCache, batch: AttentionBatch, options: AttentionOptions
    ) -> Tensor:
        kind: Kind = (q.shape[1], cache.num_kv_heads, cache.head_dim, q.dtype, options.window, options.softcap)
        kind = (*kind, options.scale)
        wrapper = batch.once(("flashinfer", kind), lambda: self._planned(kind, q, cache, batch, options))
        found: Tensor = wrapper.run(q.contiguous(), (cache.k, cache.v))
        return found

    def _planned(
        self, kind: Kind, q: Tensor, cache: PageCache, batch: AttentionBatch, options: AttentionOptions
    ) -> Any:
        """Each kind has a wrapper of its own: a wrapper holds one plan."""
        if kind not in self._wrappers:
            self._wrappers[kind] = self._make(self._workspace, "NHD")
        counts = torch.tensor([-(-length // batch.page_size) for length in batch.kv_lens], dtype=torch.int32)
        starts = torch.tensor([0, *batch.query_lens], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        pages = [torch.from_numpy(row[:count]) for row, count in zip(batch.host_tables, counts.tolist(), strict=True)]
        last = torch.tensor([(length - 1) % batch.page_size + 1 for length in batch.kv_lens], dtype=torch.int32)
        ends = torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
        self._wrappers[kind].plan(
            starts, ends, torch.cat(pages).to(q.device), last, q.shape[1], cache.num_kv_heads, cache.head_dim,
            batch.page_size, causal=True, sm_scale=options.scale, logits_soft_cap=options.softcap,
            window_left=-1 if options.window is None else options.window - 1, q_data_type=q.dtype,
            kv_data_type=cache.dtype,
        )  # fmt: skip
        return self._wrappers[kind]

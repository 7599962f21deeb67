"""The definition of paged attention: a loop over sequences in plain torch. The other bodies are tested against it."""

from __future__ import annotations

import torch
from torch import Tensor

from onebase.kernels.attention import AttentionBatch, AttentionOptions, PageCache, check_shapes


class ReferenceAttention:
    """Computes in float32, or in float64 where q is float64."""

    name = "reference"
    is_capturable = False

    def warm_up(self, num_heads: int, cache: PageCache, options: AttentionOptions) -> None:
        """Nothing is compiled."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, cache: PageCache, batch: AttentionBatch, options: AttentionOptions
    ) -> Tensor:
        check_shapes(q, k, v, cache, batch, options)
        cache.write(batch.slots, k, v)
        outputs = []
        start = 0
        for i, (query_len, kv_len) in enumerate(zip(batch.query_lens, batch.kv_lens, strict=True)):
            keys, values = (_cached(cache, half, batch, i, kv_len) for half in (0, 1))
            outputs.append(attend(q[start : start + query_len], keys, values, options))
            start += query_len
        return torch.cat(outputs)


def attend(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Tensor:
    """One sequence. q: [query_len, H, D], the last of its tokens; k, v: [kv_len, KV, D], all of them."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    keys, values = (x.to(dtype).repeat_interleave(group, dim=1) for x in (k, v))
    logits = torch.einsum("ihd,jhd->hij", q.to(dtype), keys) * options.scale
    if options.softcap is not None:
        logits = options.softcap * torch.tanh(logits / options.softcap)
    logits = logits.masked_fill(~_visible(len(q), len(k), options.window, q.device), -torch.inf)
    if options.sinks is not None:
        sinks = options.sinks.to(dtype)[:, None, None].expand(-1, len(q), 1)
        logits = torch.cat([logits, sinks], dim=-1)
    weights = torch.softmax(logits, dim=-1)[..., : len(k)]
    return torch.einsum("hij,jhd->ihd", weights, values).to(q.dtype)


def _visible(query_len: int, kv_len: int, window: int | None, device: torch.device) -> Tensor:
    """bool [query_len, kv_len]"""
    position = torch.arange(kv_len - query_len, kv_len, device=device)[:, None]
    key = torch.arange(kv_len, device=device)
    visible = key <= position
    return visible if window is None else visible & (position - key < window)


def _cached(cache: PageCache, half: int, batch: AttentionBatch, sequence: int, kv_len: int) -> Tensor:
    """[kv_len, KV, D]"""
    table = batch.block_tables[sequence, : -(-kv_len // batch.page_size)].long()
    return cache.read(half, table).flatten(0, 1)[:kv_len]

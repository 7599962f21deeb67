"""Paged attention on the CPU in torch operations: few of them, on large operands.

Query heads of one kv head are folded into the query dimension, so K and V are never repeated. Prompts go through
SDPA's flash kernel tile by tile; decoding through batched matmuls, which beat it on few rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from onebase.kernels import kv_fp8
from onebase.kernels.attention import AttentionBatch, AttentionOptions, PageCache, check_shapes
from onebase.kernels.attention_cpu_plan import Gather, Group, Layout, Steps, Tile, plan

FLASH_ROWS = 16  # queries a sequence from which the flash kernel beats batched matmuls


class CpuAttention:
    """The fast body for CPU tensors. The cache must have heads before tokens, as on the CPU."""

    name = "cpu"
    is_capturable = False

    def warm_up(self, num_heads: int, cache: PageCache, options: AttentionOptions) -> None:
        """Nothing is compiled."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, cache: PageCache, batch: AttentionBatch, options: AttentionOptions
    ) -> Tensor:
        check_shapes(q, k, v, cache, batch, options)
        layout = Layout.of(cache, q.shape[1], options.window)
        _write(k, v, cache, batch, layout.steps)
        groups = batch.once(("cpu", layout), lambda: plan(batch, layout, range(batch.num_seqs)))
        if cache.fp8 and not all(group.gather for group in groups):
            k, v = _as_stored(k), _as_stored(v)
        if len(groups) == 1 and isinstance(groups[0].tokens, slice):
            return _attend_group(q, k, v, cache, batch, groups[0], options)
        out = torch.empty(q.shape, dtype=q.dtype)
        attend_groups(q, k, v, cache, batch, groups, options, out)
        return out


def _as_stored(x: Tensor) -> Tensor:
    """What attention will read of it later."""
    return kv_fp8.decode_fast(*kv_fp8.encode(x), x.dtype)


def attend_groups(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: PageCache,
    batch: AttentionBatch,
    groups: Sequence[Group],
    options: AttentionOptions,
    out: Tensor,
) -> None:
    """Fill the groups' rows of out. K and V are in the pages already."""
    for group in groups:
        out[group.tokens] = _attend_group(q, k, v, cache, batch, group, options)


def _write(k: Tensor, v: Tensor, cache: PageCache, batch: AttentionBatch, steps: Steps) -> None:
    """Both halves in one copy of [2 * T * kv_heads, dim] rows."""
    if cache.fp8:
        cache.write(batch.slots, k, v)
        return
    rows = batch.once(("cpu write", steps, cache.num_kv_heads), lambda: _slot_rows(cache, batch, steps))
    _rows(cache, steps, 1).index_copy_(0, rows, torch.cat((k, v)).view(-1, cache.head_dim))


def _slot_rows(cache: PageCache, batch: AttentionBatch, steps: Steps) -> Tensor:
    """Rows of the cache seen as [n, dim]: K of all tokens, then V."""
    page, offset = batch.slots // batch.page_size * steps.page, batch.slots % batch.page_size
    heads = torch.cat((page, page + steps.half))[:, None] + torch.arange(cache.num_kv_heads)
    return (heads * batch.page_size + offset.repeat(2)[:, None]).view(-1)


def _rows(cache: PageCache, steps: Steps, tokens: int) -> Tensor:
    """The cache's memory from its first page to its last as rows of so many tokens, whatever else lies between them.

    tokens: page_size, or 1 (not in fp8). The rows are [n, tokens * dim]; in fp8 the tokens' exponents follow."""
    num_heads = steps.half + (cache.num_pages - 1) * steps.page + cache.num_kv_heads
    width = cache.head_items * tokens // cache.page_size
    return cache.data.as_strided((num_heads * cache.page_size // tokens, width), (width, 1))


def _attend_group(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: PageCache,
    batch: AttentionBatch,
    group: Group,
    options: AttentionOptions,
) -> Tensor:
    """[num_seqs * query_len, H, D]"""
    keys, values = _gathered(cache, group.gather, group) if group.gather else _fresh(k, v, group)
    heads, length, dim = keys.shape[1], group.query_len, q.shape[2]
    folded = q[group.tokens].view(group.num_seqs, length, heads, -1, dim).permute(0, 2, 3, 1, 4)  # [n, KV, G, L, D]
    tiles = [_attend_tile(folded, keys, values, tile, batch, options) for tile in group.tiles]
    out = tiles[0] if len(tiles) == 1 else torch.cat(tiles, dim=3)
    return out.permute(0, 3, 1, 2, 4).reshape(group.num_seqs * length, -1, dim)


def _gathered(cache: PageCache, gather: Gather, group: Group) -> tuple[Tensor, Tensor]:
    """K and V as [n, KV, S, D], each head contiguous."""
    rows = _rows(cache, Steps.of(cache), cache.page_size).index_select(0, gather.pages)
    copied = (_decoded(rows, cache) if cache.fp8 else rows).view(-1, cache.head_dim).index_fill_(0, gather.dead, 0.0)
    keys, values = copied.view(2, group.num_seqs, cache.num_kv_heads, -1, cache.head_dim)
    return keys, values


def _decoded(rows: Tensor, cache: PageCache) -> Tensor:
    """[n, page_size, dim] from rows [n, page_size * dim + page_size]."""
    items = cache.page_size * cache.head_dim
    codes = rows[:, :items].view(-1, cache.page_size, cache.head_dim)
    return kv_fp8.decode_fast(codes, rows[:, items:], cache.dtype)


def _fresh(k: Tensor, v: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """The step's own K and V as [n, KV, L, D], each head contiguous."""
    shape = (group.num_seqs, group.query_len, k.shape[1], k.shape[2])
    keys, values = (x[group.tokens].view(shape).transpose(1, 2).contiguous() for x in (k, v))
    return keys, values


def _attend_tile(
    q: Tensor, keys: Tensor, values: Tensor, tile: Tile, batch: AttentionBatch, options: AttentionOptions
) -> Tensor:
    """[n, KV, G, rows, D] from q [n, KV, G, L, D]."""
    rows, wide = q[:, :, :, tile.rows], torch.promote_types(q.dtype, torch.float32)
    keys, values = keys[:, :, tile.columns], values[:, :, tile.columns]
    if options.softcap is None and options.sinks is None and rows.shape[3] >= FLASH_ROWS:
        return _flash(rows, keys, values, _mask(tile, batch, q.dtype, q.shape[2]), options.scale)
    return _matmul(rows, keys, values, _mask(tile, batch, wide, 1), options)


def _mask(tile: Tile, batch: AttentionBatch, dtype: torch.dtype, group: int) -> Tensor:
    """[num_seqs or 1, 1, group * rows, columns], the same for each head of the group."""

    def make() -> Tensor:
        return tile.mask(dtype).repeat(1, group, 1)[:, None]

    return batch.once(("cpu mask", id(tile), dtype, group), make) if tile.keep else make()


def _flash(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    out = F.scaled_dot_product_attention(q.flatten(2, 3), keys, values, attn_mask=mask, scale=scale)
    return out.view(q.shape)


def _matmul(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, options: AttentionOptions) -> Tensor:
    logits = _logits(q, keys, mask[:, :, None], options)
    weights = torch.softmax(logits, dim=-1).to(values.dtype)
    out = torch.bmm(weights.view(-1, q.shape[2] * q.shape[3], keys.shape[2]), values.flatten(0, 1)).view(q.shape)
    return out if options.sinks is None else _with_sinks(out, logits, options.sinks)


def _logits(q: Tensor, keys: Tensor, mask: Tensor, options: AttentionOptions) -> Tensor:
    """float32 [n, KV, G, rows, columns]. A 16-bit matmul rounds its result to 16 bits, which is too coarse for logits:
    a second one, ``q @ k - rounded``, accumulates in float32 and returns what was lost."""
    flat, transposed = q.reshape(keys.shape[0] * keys.shape[1], -1, q.shape[4]), keys.flatten(0, 1).transpose(1, 2)
    shape = (*q.shape[:4], keys.shape[2])
    high = torch.bmm(flat, transposed)
    parts = [high.view(shape)]
    if q.dtype.itemsize == 2:
        parts.append(torch.baddbmm(high, flat, transposed, beta=-1).view(shape))
    if options.softcap is not None:
        exact = sum(parts[1:], parts[0].to(mask.dtype))
        return exact.mul_(options.scale / options.softcap).tanh_().mul_(options.softcap).add(mask)
    logits = torch.add(mask, parts[0], alpha=options.scale)
    return logits.add_(parts[1], alpha=options.scale) if len(parts) > 1 else logits


def _with_sinks(out: Tensor, logits: Tensor, sinks: Tensor) -> Tensor:
    """Scales by exp(lse) / (exp(lse) + exp(sink)): the share the keys keep once the sink joins the denominator."""
    lse = torch.logsumexp(logits, dim=-1, keepdim=True)  # [n, KV, G, rows, 1]
    share = torch.sigmoid(lse - sinks.to(lse.dtype).view(1, out.shape[1], out.shape[2], 1, 1))
    return (out * share).to(out.dtype)

"""What bodies share: the batch, its checks, the choice of a body, the bytes of pages, the CPU body's plan."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onebase.kernels.attention import AttentionBatch, AttentionOptions, PageCache, select_attention
from onebase.kernels.attention_cpu_plan import Group, Layout, Steps, plan
from onebase.kernels.native.library import available

CPU = torch.device("cpu")


def test_build_places_new_tokens_after_cached_ones() -> None:
    batch = AttentionBatch.build([1, 3], [5, 6], [[7, 2], [1, 0, 9]], 4, CPU)
    assert batch.slots.tolist() == [2 * 4, 1 * 4 + 3, 0, 1]  # the third page of the second sequence is not needed yet
    assert batch.block_tables.tolist() == [[7, 2], [1, 0]]
    assert batch.query_starts.tolist() == [0, 1, 4]
    assert batch.kv_lens_device.tolist() == [5, 6]
    assert (batch.query_lens, batch.kv_lens, batch.num_tokens, batch.num_seqs) == ((1, 3), (5, 6), 4, 2)
    dtypes = [x.dtype for x in (batch.slots, batch.block_tables, batch.query_starts, batch.kv_lens_device)]
    assert dtypes == [torch.int64, torch.int32, torch.int32, torch.int32]


def test_slots_beyond_int32() -> None:
    batch = AttentionBatch.build([2], [130], [[0, 2**28]], 128, CPU)
    assert batch.slots.tolist() == [2**35, 2**35 + 1]


@pytest.mark.parametrize(
    ("query_lens", "kv_lens", "pages", "page_size", "message"),
    [
        ([1], [1, 1], [[0]], 8, "query_lens, kv_lens, pages have 1, 2, 1 entries"),
        ([], [], [], 8, "at least one sequence"),
        ([0], [1], [[0]], 8, "kv_len >= query_len >= 1"),
        ([3], [2], [[0]], 8, "kv_len >= query_len >= 1"),
        ([1], [9], [[0]], 8, "1 pages of 8 for a sequence of 9 tokens"),
        ([1], [1], [[0]], 0, "page_size is 0"),
    ],
)
def test_build_refuses(
    query_lens: list[int], kv_lens: list[int], pages: list[list[int]], page_size: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        AttentionBatch.build(query_lens, kv_lens, pages, page_size, CPU)


def test_build_is_cheap() -> None:
    """Called each step: 64 rows of 200 tokens in well under a millisecond (CPU time, best of many)."""
    pages = [list(range(13))] * 64
    best = min(_cpu_seconds(lambda: AttentionBatch.build([1] * 64, [200] * 64, pages, 16, CPU)) for _ in range(50))
    assert best < 1e-3


def _cpu_seconds(work: object) -> float:
    start = time.process_time()
    work()  # type: ignore[operator]
    return time.process_time() - start


def test_once_makes_a_value_once() -> None:
    batch = AttentionBatch.build([1], [1], [[0]], 8, CPU)
    made: list[int] = []
    values = [batch.once(key, lambda: made.append(1) or object()) for key in ("a", "a", "b")]
    assert values[0] is values[1] is not values[2]
    assert len(made) == 2


@pytest.mark.parametrize("device", [CPU, torch.device("meta")])
def test_pages_hold_what_bytes_per_page_says(device: torch.device) -> None:
    cache = PageCache.allocate(5, 16, 3, 64, torch.bfloat16, device)
    assert cache.k.shape == cache.v.shape == (5, 16, 3, 64)
    assert cache.data.numel() * 2 == 5 * PageCache.bytes_per_page(16, 3, 64, torch.bfloat16) == 5 * 12288


def test_options_refuse() -> None:
    with pytest.raises(ValueError, match="window is 0"):
        AttentionOptions(1.0, window=0)
    with pytest.raises(ValueError, match="softcap is 0"):
        AttentionOptions(1.0, softcap=0.0)


def test_selection() -> None:
    assert select_attention(CPU).name == ("native" if available() else "cpu")
    assert select_attention(CPU, "cpu").name == "cpu"
    assert select_attention(CPU, "reference").name == "reference"
    for device, choice in ((torch.device("cuda"), "cpu"), (torch.device("meta"), "auto")):
        with pytest.raises(ValueError, match=r"attention '(cpu|native)' cannot run on"):
            select_attention(device, choice)  # type: ignore[arg-type]


LENS = st.integers(1, 3000).flatmap(
    lambda n: st.tuples(st.one_of(st.just(1), st.just(n), st.integers(1, n)), st.just(n))
)


@settings(deadline=None, max_examples=50)
@given(st.lists(LENS, min_size=1, max_size=20), st.none() | st.integers(1, 500), st.integers(0, 99))
def test_plan_covers_every_token_once_and_reads_only_own_pages(
    lens: list[tuple[int, int]], window: int | None, seed: int
) -> None:
    batch, owner = _scattered(lens, seed)
    layout = Layout(Steps(page=2, half=2 * len(owner)), 2, token_bytes=512, group_heads=3, window=window)
    groups = plan(batch, layout, range(batch.num_seqs))
    rows = np.concatenate([_rows(group, batch.num_tokens) for group in groups])
    assert sorted(rows.tolist()) == list(range(batch.num_tokens))
    sequence = np.repeat(np.arange(len(lens)), batch.query_lens)
    for group in groups:
        members = sequence[_rows(group, batch.num_tokens)[:: group.query_len]]
        if group.gather is not None:
            pages = group.gather.pages.numpy().reshape(2, group.num_seqs, 2, -1) // 2 % len(owner)
            assert (owner[pages] == members[None, :, None, None]).all()
        for tile in group.tiles:
            assert (tile.mask(torch.float32).amax(-1) == 0).all()  # each query sees a key


def _scattered(lens: list[tuple[int, int]], seed: int) -> tuple[AttentionBatch, np.ndarray]:
    counts = [-(-kv_len // 16) for _, kv_len in lens]
    order = random.Random(seed).sample(range(sum(counts)), sum(counts))
    pages = [[order.pop() for _ in range(count)] for count in counts]
    owner = np.zeros(sum(counts), dtype=np.int64)
    for i, held in enumerate(pages):
        owner[held] = i
    return AttentionBatch.build([q for q, _ in lens], [n for _, n in lens], pages, 16, CPU), owner


def _rows(group: Group, num_tokens: int) -> np.ndarray:
    return np.arange(num_tokens)[group.tokens if isinstance(group.tokens, slice) else group.tokens.numpy()]


def test_one_long_sequence_does_not_pad_the_short_ones() -> None:
    batch, owner = _scattered([(1, 8000)] + [(1, 100)] * 15, 0)
    groups = plan(batch, Layout(Steps(2, 2 * len(owner)), 2, 512, 3, None), range(batch.num_seqs))
    assert [group.num_seqs for group in groups] == [1, 15]
    assert [len(group.gather.pages) for group in groups if group.gather] == [2 * 2 * 500, 2 * 15 * 2 * 7]


def test_a_window_gathers_only_its_pages() -> None:
    batch, owner = _scattered([(1, 8000), (16, 8000)], 0)
    decode, context = plan(batch, Layout(Steps(2, 2 * len(owner)), 2, 512, 3, 64), range(batch.num_seqs))
    assert decode.gather is not None
    assert context.gather is not None
    assert len(decode.gather.pages) == 2 * 2 * (64 // 16)
    assert len(context.gather.pages) == 2 * 2 * ((64 + 16) // 16)

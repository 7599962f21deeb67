"""The arena: exact blocks, no overlap, everything comes back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onebase.adapters.errors import AdapterRejected
from onebase.adapters.packing import pack, shifted
from onebase.adapters.program import AdapterProgram, LowRank, SiteOps, TokenLowRank
from onebase.adapters.tiers.arena import BLOCK_ALIGN, Arena


def _arena(blocks: int = 10) -> Arena:
    return Arena(blocks * BLOCK_ALIGN, torch.float32, torch.device("cpu"))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 5 * BLOCK_ALIGN), max_size=40), st.randoms(use_true_random=False))
def test_blocks_never_overlap_and_all_comes_back(sizes: list[int], random: object) -> None:
    arena = _arena(20)
    held: dict[int, int] = {}
    for size in sizes:
        start = arena.allocate(size)
        if start is None:
            assert arena.capacity - arena.used < size or len(held) > 1, "an empty arena has one free range"
            start = sorted(held)[random.randrange(len(held))]  # type: ignore[attr-defined]
            arena.free(start)
            del held[start]
        else:
            assert all(start >= s + n or start + size <= s for s, n in held.items())
            assert start + size <= arena.capacity
            held[start] = size
        arena.check()
    for start in held:
        arena.free(start)
    arena.check()
    assert arena.used == 0
    assert arena.allocate(arena.capacity) == 0


def test_check_finds_a_count_that_is_wrong() -> None:
    arena = _arena()
    arena.allocate(1)
    arena.used += 1
    with pytest.raises(RuntimeError, match="counted"):
        arena.check()


def test_the_smallest_range_that_fits_is_taken() -> None:
    arena = _arena(10)
    starts = [arena.allocate(n * BLOCK_ALIGN) for n in (3, 1, 2, 1)]
    arena.free(starts[0])
    arena.free(starts[2])
    assert arena.allocate(2 * BLOCK_ALIGN) == starts[2]
    assert arena.allocate(4 * BLOCK_ALIGN) is None


def test_a_block_freed_twice_is_an_error() -> None:
    arena = _arena()
    start = arena.allocate(1)
    arena.free(start)
    with pytest.raises(KeyError):
        arena.free(start)


def test_its_end_moves_over_free_room_only() -> None:
    buffer = torch.zeros(20 * BLOCK_ALIGN)
    arena = Arena.within(buffer, 8 * BLOCK_ALIGN, 16 * BLOCK_ALIGN)
    first, second = arena.allocate(2 * BLOCK_ALIGN), arena.allocate(3 * BLOCK_ALIGN)
    assert (arena.free_bytes, arena.tail_bytes) == (3 * 256, 3 * 256)
    for blocks in (4, 17):
        with pytest.raises(ValueError, match="capacity"):
            arena.resize(blocks * BLOCK_ALIGN)
        arena.check()
    arena.resize(5 * BLOCK_ALIGN)
    arena.check()
    assert (arena.tail_bytes, arena.allocate(1)) == (0, None)
    arena.resize(16 * BLOCK_ALIGN)
    assert (arena.free_bytes, arena.tail_bytes, arena.limit_bytes) == (11 * 256, 11 * 256, 16 * 256)
    arena.free(first)
    assert (arena.free_bytes, arena.tail_bytes) == (13 * 256, 11 * 256)
    arena.free(second)
    arena.resize(0)
    arena.check()
    assert arena.capacity == 0


def test_pack_keeps_every_value_where_its_operands_say() -> None:
    generator = torch.Generator().manual_seed(0)
    low_rank = LowRank(torch.randn(3, 10, generator=generator), torch.randn(3, 7, generator=generator), 2.0)
    token = TokenLowRank(torch.randn(11, 2, generator=generator), torch.randn(2, 5, generator=generator), 0.5)
    bias = torch.randn(7, generator=generator)
    program = AdapterProgram("d", "LORA", {"a": SiteOps(low_rank, add_out=bias), "e": SiteOps(token_low_rank=token)})
    packed = pack(program, torch.float32)
    assert packed.data.numel() >= program.num_elements
    buffer = torch.full((packed.data.numel() + 128,), float("nan"))
    buffer[64 : 64 + packed.data.numel()] = packed.data
    a, e = (shifted(packed.operands[path], 64) for path in ("a", "e"))
    assert torch.equal(buffer[a.a : a.a + 30].view(3, 10), low_rank.a)
    assert torch.equal(buffer[a.b : a.b + 21].view(3, 7), low_rank.b)
    assert torch.equal(buffer[a.add_out : a.add_out + 7], bias)
    assert torch.equal(buffer[e.a : e.a + 22].view(11, 2), token.a)
    assert (a.rank, a.scale, e.token, e.add_out) == (3, 2.0, True, -1)


def test_values_that_overflow_in_the_arenas_type_are_refused() -> None:
    good = LowRank(torch.ones(1, 4), torch.ones(1, 4), 1.0)
    bad = LowRank(torch.ones(1, 4), torch.full((1, 4), 1e5), 1.0)
    program = AdapterProgram("d", "LORA", {"first": SiteOps(good), "second": SiteOps(bad), "third": SiteOps(good)})
    pack(program, torch.bfloat16)
    with pytest.raises(AdapterRejected, match=r"second.*float16"):
        pack(program, torch.float16)

"""The host tier against a plain model of it: bytes, sharing, protection, who goes."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from onebase.adapters.packing import PackedProgram
from onebase.adapters.tiers.host import HostTier
from onebase.adapters.tiers.policy import Lrfu
from onebase.adapters.traits import Traits


def _packed(digest: str, elements: int = 100, **shared: Tensor) -> PackedProgram:
    return PackedProgram(digest, "TEST", 0, 0, Traits(), torch.zeros(elements), {}, {}, shared)


@pytest.fixture
def gone() -> list[str]:
    return []


@pytest.fixture
def tier(gone: list[str]) -> HostTier:
    """Room for four programs of a hundred floats."""
    return HostTier(1600, Lrfu(), gone.append)


def test_the_coldest_unprotected_one_goes(tier: HostTier, gone: list[str]) -> None:
    for digest in "abcd":
        tier._policy.know(digest)
        tier.put(_packed(digest), ())
    tier._policy.use("a")
    tier.put(_packed("e"), protected={"b"})
    assert gone == ["c"]
    assert [digest in tier for digest in "abcde"] == [True, True, False, True, True]
    assert tier.evictions == 1
    tier.check()


def test_each_score_is_looked_at_once_for_all_that_go(gone: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    tier = HostTier(100 * 400, Lrfu(), gone.append)
    for number in range(100):
        tier.put(_packed(str(number)), ())
    looked: list[str] = []
    monkeypatch.setattr(tier._policy, "_score", lambda digest: looked.append(digest) or float(digest))
    tier.put(_packed("1000", 5000), protected={"7"})
    assert gone == [str(number) for number in range(51) if number != 7]
    assert len(looked) == 99
    tier.check()


def test_nobody_goes_where_it_would_not_help(tier: HostTier, gone: list[str]) -> None:
    for digest in "abcd":
        tier.put(_packed(digest), ())
    big = _packed("big", 300)
    assert tier.put(big, protected={"a", "b"}) is big
    assert "big" not in tier
    assert gone == []
    tier.put(_packed("huge", 500), ())
    assert gone == []
    tier.put(big, protected={"a"})
    assert sorted(gone) == ["b", "c", "d"]


def test_what_is_shared_is_held_once(tier: HostTier) -> None:
    one = tier.put(_packed("a", 50, k=torch.ones(200)), ())
    two = tier.put(_packed("b", 50, k=torch.ones(200)), ())
    assert one.shared["k"] is two.shared["k"]
    assert tier.used == 4 * (50 + 50 + 200)
    tier.drop("a")
    assert tier.used == 4 * (50 + 200)
    tier.drop("b")
    tier.drop("b")
    assert tier.used == 0
    tier.check()


def test_changes_are_told_once(tier: HostTier) -> None:
    tier.put(_packed("a"), ())
    tier.put(_packed("b"), ())
    tier.drop("a")
    assert tier.changes() == ({"b"}, {"a"})
    assert tier.changes() == (set(), set())
    tier.drop("b")
    tier.put(_packed("b"), ())
    assert tier.changes() == ({"b"}, set())


def test_a_tier_without_room_holds_nothing() -> None:
    tier = HostTier(0, Lrfu(), lambda digest: None)
    packed = _packed("a")
    assert tier.put(packed, ()) is packed
    assert len(tier) == tier.used == 0
    assert tier.look("a") is None
    assert (tier.hits, tier.misses) == (0, 1)


class Model:
    """What the tier should hold: sets and sums, nothing clever."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.held: dict[str, tuple[int, dict[str, int]]] = {}

    def used(self, held: dict[str, tuple[int, dict[str, int]]]) -> int:
        shared = {key: size for _, parts in held.values() for key, size in parts.items()}
        return sum(own for own, _ in held.values()) + sum(shared.values())

    def put(self, digest: str, own: int, parts: dict[str, int], protected: set[str], order: list[str]) -> None:
        """order: coldest first."""
        if digest in self.held:
            return
        may_go = sum(size for one, (size, _) in self.held.items() if one not in protected)
        new = own + sum(size for key, size in parts.items() if all(key not in p for _, p in self.held.values()))
        if self.used(self.held) - may_go + new > self.capacity:
            return
        held = dict(self.held)
        for one in [one for one in order if one in held and one not in protected]:
            if self.used(held | {digest: (own, parts)}) <= self.capacity:
                break
            del held[one]
        if self.used(held | {digest: (own, parts)}) <= self.capacity:
            held[digest] = own, parts
        self.held = held


@pytest.mark.parametrize("seed", range(20))
def test_random_lives_agree_with_the_model(seed: int) -> None:
    draw, policy = random.Random(seed), Lrfu(half_life=5)
    tier, model = HostTier(4 * 600, policy, lambda digest: None), Model(4 * 600)
    sizes = {digest: draw.randrange(20, 200) for digest in "abcdefghij"}
    pools = {digest: draw.choice(["", "", "x", "y", "xy"]) for digest in sizes}
    shared = {"x": torch.ones(100), "y": torch.ones(150)}
    for digest in sizes:
        policy.use(digest)
    for _ in range(300):
        digest = draw.choice(sorted(sizes))
        protected = set(draw.sample(sorted(sizes), draw.randrange(4)))
        action = draw.choice(("put", "put", "put", "use", "drop"))
        if action == "put":
            order = sorted(sizes, key=policy._score)
            parts = {key: 4 * shared[key].numel() for key in pools[digest]}
            model.put(digest, 4 * sizes[digest], parts, protected, order)
            tier.put(_packed(digest, sizes[digest], **{key: shared[key].clone() for key in pools[digest]}), protected)
        elif action == "use":
            policy.use(digest)
        else:
            model.held.pop(digest, None)
            tier.drop(digest)
        tier.check()
        assert {one for one in sizes if one in tier} == set(model.held)
        assert tier.used == model.used(model.held)

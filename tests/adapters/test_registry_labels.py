"""Labels and aliases: what they may be, what they mean, and what they outlive."""

from __future__ import annotations

from pathlib import Path

import pytest

from onebase.adapters.errors import AdapterConflict, AdapterNameInvalid, AdapterNotFound, AdapterRejected
from onebase.adapters.registry import Registry

from .registry_helpers import push


def test_labels(registry: Registry, adapter: Path, other: Path) -> None:
    push(registry, "a", adapter)
    assert registry.change("a", labels={"team": "x", "stage": "prod"}).labels == {"team": "x", "stage": "prod"}
    assert registry.change("a", labels={"team": "y", "stage": None, "never": None}).labels == {"team": "y"}
    assert push(registry, "a", other).labels == {"team": "y"}, "labels are the name's"
    assert registry.get("a@1").labels == {"team": "y"}
    assert registry.change("a", labels={}).labels == {"team": "y"}
    registry.delete("a")
    assert push(registry, "a", adapter).labels == {}
    with pytest.raises(AdapterNotFound):
        registry.change("b", labels={"team": "x"})


@pytest.mark.parametrize("key", ["", "-a", "a b", "a\n", "é", "a=b", "a,b", "x" * 64])
def test_keys_that_are_no_label(key: str, registry: Registry, adapter: Path) -> None:
    push(registry, "a", adapter)
    with pytest.raises(AdapterRejected, match="not a label's key") as refusal:
        registry.change("a", labels={"fine": "x", key: "x"})
    assert refusal.value.param == "labels"
    assert registry.get("a").labels == {}, "all or nothing"


@pytest.mark.parametrize("value", ["a\n", "\0", "x" * 257, "\u202e"])
def test_values_that_are_no_label(value: str, registry: Registry, adapter: Path) -> None:
    push(registry, "a", adapter)
    with pytest.raises(AdapterRejected, match="printable"):
        registry.change("a", labels={"fine": value})
    assert registry.change("a", labels={"fine": "é ü = , ; ' \" % x" + "x" * 200}).labels.keys() == {"fine"}


def test_the_number_of_labels_and_aliases_is_bounded(registry: Registry, adapter: Path) -> None:
    push(registry, "a", adapter)
    registry.change("a", labels={f"k{index}": "x" for index in range(64)})
    with pytest.raises(AdapterRejected, match="at most 64 labels"):
        registry.change("a", labels={"one": "more"})
    registry.change("a", labels={"k0": None, "one": "more"})
    registry.change("a", aliases={f"x{index}": None for index in range(64)})
    with pytest.raises(AdapterRejected, match="at most 64 aliases"):
        registry.change("a", aliases={"one": None})
    assert len(registry.get("a").aliases) == len(registry.get("a").labels) == 64


def test_aliases_of_a_version_and_of_the_current_one(registry: Registry, adapter: Path, other: Path) -> None:
    first, second = push(registry, "a", adapter), push(registry, "a", other)
    entry = registry.change("a", aliases={"stable": 1, "newest": None})
    assert (entry.version, entry.aliases) == (2, ("newest", "stable"))
    assert registry.aliases("a") == {"newest": None, "stable": 1}
    assert (registry.get("stable").digest, registry.get("newest").digest) == (first.digest, second.digest)
    assert registry.get("stable").name == "a"
    third = push(registry, "a", adapter)
    assert registry.get("newest").version == third.version
    held, ticket = registry.hold("stable")
    assert held.version == 1
    registry.release(ticket)

    assert registry.change("a", aliases={"stable": 2}).aliases == ("newest", "stable")
    assert registry.aliases("a") == {"newest": None, "stable": 2}
    assert registry.change("a", aliases={"last": 3}, dropped=("newest", "stable", "never")).aliases == ("last",)
    with pytest.raises(AdapterNotFound):
        registry.get("stable")
    assert registry.change("a", dropped=("last",)).aliases == ()


def test_an_alias_has_no_versions_and_is_no_name(registry: Registry, adapter: Path) -> None:
    entry = push(registry, "a", adapter)
    registry.change("a", aliases={"stable": 1})
    for reference in ("stable@1", f"stable@sha256:{entry.digest}"):
        with pytest.raises(AdapterNotFound):
            registry.get(reference)
    for call in (
        lambda: registry.change("stable", pinned=True),
        lambda: registry.change("stable", labels={}),
        lambda: registry.change("stable", aliases={}),
        lambda: registry.rollback("stable", 1),
        lambda: registry.delete("stable"),
        lambda: registry.versions("stable"),
    ):
        with pytest.raises(AdapterNotFound):
            call()
    assert [found.name for found in registry.list().entries] == ["a"]
    assert registry.aliases("stable") == {}


def test_names_and_aliases_share_a_namespace(registry: Registry, adapter: Path, other: Path) -> None:
    push(registry, "a", adapter)
    push(registry, "b", adapter)
    registry.change("a", aliases={"stable": 1})
    for call in (
        lambda: push(registry, "stable", other),
        lambda: registry.begin_import("stable", "hf:x/y", None, ""),
        lambda: registry.change("b", aliases={"stable": 1}),
        lambda: registry.change("b", aliases={"a": 1}),
        lambda: registry.change("b", aliases={"b": 1}),
    ):
        with pytest.raises(AdapterConflict):
            call()
    assert registry.aliases("a") == {"stable": 1}
    assert registry.aliases("b") == {}
    registry.delete("a")
    assert push(registry, "stable", other).version == 1, "a deleted name takes its aliases with it"
    assert registry.change("b", aliases={"a": 1}).aliases == ("a",), "and is free"


def test_bad_aliases_change_nothing(registry: Registry, adapter: Path) -> None:
    push(registry, "a", adapter)
    registry.change("a", aliases={"stable": 1})
    with pytest.raises(AdapterNotFound, match="a@2"):
        registry.change("a", aliases={"fine": 1, "stable": 2})
    for name in ("../a", "a@1", "", "x" * 129, "ｓtable", "a\n"):
        with pytest.raises(AdapterNameInvalid) as refusal:
            registry.change("a", aliases={"fine": 1, name: 1})
        assert refusal.value.param == "aliases"
    with pytest.raises(AdapterNotFound):
        registry.change("b", aliases={"fine": 1})
    assert registry.aliases("a") == {"stable": 1}

"""What the store keeps in memory: bounded, and right about who holds what."""

from __future__ import annotations

from onebase.serve.api.holds import Holds
from onebase.serve.api.import_states import FAILED, IMPORTING, ImportStates
from onebase.serve.api.uses import Uses


def test_what_is_retired_leaves_with_its_last_hold() -> None:
    holds = Holds()
    holds.take("a")
    holds.take("a")
    assert holds.retire(["a", "b"]) == ["b"], "nobody holds b"
    assert not holds.give_back("a")
    assert holds.give_back("a")
    holds.take("a")
    assert not holds.give_back("a"), "once is enough"


def test_what_has_a_name_again_stays() -> None:
    holds = Holds()
    holds.take("a")
    assert holds.retire(["a"]) == []
    holds.revive(["a"])
    assert not holds.give_back("a")


def test_what_is_held() -> None:
    holds = Holds()
    holds.take("a")
    assert ("a" in holds, "b" in holds) == (True, False)
    holds.give_back("a")
    assert "a" not in holds


def test_uses_are_of_a_version_and_bounded() -> None:
    uses = Uses(most=2)
    for name, version in (("a", 1), ("a", 1), ("a", 2), ("a", 1), ("b", 1)):
        uses.add(name, version)
    assert (uses.of("a", 1), uses.of("a", 2), uses.of("b", 1)) == (3, 0, 1), "the least recently used went"


def test_states_of_imports_are_bounded_and_cleared() -> None:
    states = ImportStates(most=2)
    for name in ("a", "b", "a", "c"):
        states.set(name, IMPORTING)
    states.set("c", FAILED)
    assert dict(states.current) == {"a": IMPORTING, "c": FAILED}
    states.clear("a")
    states.clear("nobody")
    states.set("d", IMPORTING)
    assert dict(states.current) == {"c": FAILED, "d": IMPORTING}
    states.clear_failed()
    assert dict(states.current) == {"d": IMPORTING}

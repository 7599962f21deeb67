"""How long a conversation is, counted no further than it matters."""

from __future__ import annotations

from typing import Any

from onebase.serve.api.conversation import Conversation, longer_than


def test_texts_keys_numbers_and_brackets_count() -> None:
    assert not longer_than("abc", 3)
    assert longer_than("abcd", 3)
    assert longer_than({"key": "x"}, 4)
    assert not longer_than({"key": "x"}, 5)
    assert longer_than([[[[]]]], 3)
    assert longer_than([1 << 4000], 500)


def test_deep_values_cost_no_stack() -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    assert longer_than(deep, 1000)


def test_all_of_a_request_counts() -> None:
    said = {"role": "user", "content": "x" * 50}
    assert Conversation([said]).is_plain
    assert Conversation([said]).exceeds(50)
    assert not Conversation([said]).exceeds(90)
    for more in (
        Conversation([said], tools=[{"name": "y" * 50}]),
        Conversation([said], kwargs={"name": "y" * 50}),
        Conversation([{**said, "tool_calls": [{"name": "y" * 50}]}]),
    ):
        assert more.exceeds(90)
        assert not more.is_plain

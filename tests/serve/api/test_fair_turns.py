"""Turns among tenants: nobody waits behind all that another has asked for, and who leaves holds nothing up."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from onebase.serve.api.fair_turns import FairTurns
from onebase.serve.api.grammar_checker import GrammarChecker, _Worker
from onebase.serve.engine.messages import Grammar


async def _settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_tenants_take_turns_and_each_keeps_its_order(run: Any) -> None:
    async def body() -> None:
        turns, served = FairTurns(), list[str]()

        async def work(tenant: str, name: str) -> None:
            async with turns.turn(tenant):
                await asyncio.sleep(0)
                served.append(name)

        await asyncio.gather(*[work(name[0], name) for name in ("a0", "a1", "a2", "a3", "b0", "b1", "c0")])
        assert served == ["a0", "a1", "b0", "c0", "a2", "b1", "a3"]
        assert not turns._taken
        assert not turns._waiting

    run(body())


@pytest.mark.parametrize("with_the_turn", [False, True])
def test_a_waiter_that_leaves_holds_nobody_up_and_leaves_nothing(run: Any, with_the_turn: bool) -> None:
    """with_the_turn: it leaves just as it is given its turn."""

    async def body() -> None:
        turns, release, served = FairTurns(), asyncio.Event(), list[str]()

        async def work(tenant: str) -> None:
            async with turns.turn(tenant):
                await release.wait()
                served.append(tenant)

        holder, leaver, last = [asyncio.create_task(work(tenant)) for tenant in "abc"]
        await _settle()
        if with_the_turn:
            holder.add_done_callback(lambda _: leaver.cancel())
            release.set()
        else:
            leaver.cancel()
            await _settle()
            release.set()
        await asyncio.wait_for(asyncio.gather(holder, leaver, last, return_exceptions=True), 10)
        assert served[0] == "a"
        assert served[-1] == "c"
        assert not turns._taken
        assert not turns._waiting

    run(body())


def test_a_tenants_grammars_do_not_wait_behind_all_of_anothers(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    async def refusal(worker: _Worker, grammar: Grammar) -> None:
        await asyncio.sleep(0)
        tried.append(grammar.source)

    monkeypatch.setattr(_Worker, "_refusal", refusal)

    async def body() -> None:
        checker = GrammarChecker()
        many = [checker.checked(Grammar("regex", f"many{at}"), "x", "many") for at in range(20)]
        await asyncio.gather(*many, checker.checked(Grammar("regex", "few"), "x", "few"))
        assert tried.index("few") <= 2

    run(body())

"""Grammars are tried in processes of their own: what runs away or crashes there harms nobody else."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from onebase.serve.api.errors import ApiError
from onebase.serve.api.grammar_checker import GrammarChecker
from onebase.serve.engine.messages import Grammar

GOOD = Grammar("json_schema", '{"type": "object"}')


def _runaway(kind: int) -> Grammar:
    patterns = [{"pattern": f"a{{{i},{i + 400 + kind}}}b*"} for i in range(300)]
    return Grammar("json_schema", json.dumps({"allOf": patterns}))


RUNAWAY = _runaway(0)


@asynccontextmanager
async def checking(seconds: float = 60.0, quick_seconds: float = 1.0) -> AsyncIterator[GrammarChecker]:
    checker = GrammarChecker(seconds, quick_seconds)
    try:
        yield checker
    finally:
        await checker.close()


async def _refusal(checker: GrammarChecker, grammar: Grammar) -> str:
    with pytest.raises(ApiError) as refused:
        await checker.checked(grammar, "some.field")
    assert (refused.value.status, refused.value.param, refused.value.code) == (400, "some.field", "invalid_grammar")
    return refused.value.message


def test_good_grammars_pass_and_bad_ones_are_told_why(run: Any) -> None:
    async def scenario() -> None:
        async with checking() as checker:
            assert (await checker.checked(GOOD, "x")) == GOOD
            assert "unclosed" in await _refusal(checker, Grammar("json_schema", '{"pattern": "("}'))
            assert await checker.checked(Grammar("regex", "a+\n\u2028é"), "x")

    run(scenario())


def test_a_runaway_is_ended_and_others_are_served_meanwhile(run: Any) -> None:
    async def scenario() -> None:
        async with checking(seconds=2.0) as checker:
            runaway = asyncio.create_task(_refusal(checker, RUNAWAY))
            for at in range(20):
                await checker.checked(Grammar("regex", f"a{{{at}}}b"), "x")
            assert "longer than 2 seconds" in await runaway
            await checker.checked(GOOD, "x")

    run(scenario())


@pytest.mark.parametrize("delay", [None, 0.0, 0.2])
def test_a_process_that_is_killed_is_replaced_and_nobody_is_refused(run: Any, delay: float | None) -> None:
    """Idle, as it is asked, or with a grammar at hand."""

    async def scenario() -> None:
        async with checking() as checker:
            await checker.checked(GOOD, "x")
            process = checker._workers[0]._process
            assert process is not None
            if delay is None:
                process.kill()
                await process.wait()
            else:
                os.kill(process.pid, signal.SIGSTOP)
                asyncio.get_running_loop().call_later(delay, process.kill)
            await asyncio.gather(*[checker.checked(Grammar("regex", f"x{{{at}}}y"), "x") for at in range(4)])

    run(scenario())


def test_grammars_that_take_long_do_not_keep_others_waiting(run: Any) -> None:
    """Of a queue of them each has a moment before the others, and its time after them."""

    async def scenario() -> None:
        async with checking(seconds=4.0, quick_seconds=0.1) as checker:
            runaways = [asyncio.create_task(_refusal(checker, _runaway(at))) for at in range(3)]
            await asyncio.sleep(0)
            await checker.checked(GOOD, "x")
            assert not any(task.done() for task in runaways)
            for task in runaways:
                task.cancel()
            await asyncio.gather(*runaways, return_exceptions=True)

    run(scenario())


def test_what_was_refused_is_not_tried_again(run: Any) -> None:
    async def scenario() -> None:
        async with checking(seconds=0.3) as checker:
            first = await _refusal(checker, RUNAWAY)
            await checker.close()
            assert await _refusal(checker, RUNAWAY) == first
            assert all(worker._process is None for worker in checker._workers), "asked nobody"

    run(scenario())


def test_a_client_that_leaves_leaves_no_half_answer_behind(run: Any) -> None:
    async def scenario() -> None:
        async with checking() as checker:
            for at in range(4):
                asked = asyncio.create_task(checker.checked(RUNAWAY, "x"))
                await asyncio.sleep(0.01 * at)
                asked.cancel()
                await asyncio.gather(asked, return_exceptions=True)
            assert "pattern" not in await _refusal(checker, Grammar("regex", "("))
            await checker.checked(GOOD, "x")

    run(scenario())


def test_good_grammars_are_remembered_and_bounded(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onebase.serve.api.grammar_checker.REMEMBERED", 2)

    async def scenario() -> None:
        async with checking() as checker:
            for at in (1, 2, 1, 3):
                await checker.checked(Grammar("regex", f"a{{{at}}}"), "x")
            assert [grammar.source for grammar in checker._refusals] == ["a{1}", "a{3}"]
            await checker.close()
            await checker.checked(Grammar("regex", "a{3}"), "x")
            assert all(worker._process is None for worker in checker._workers), "asked nobody"

    run(scenario())

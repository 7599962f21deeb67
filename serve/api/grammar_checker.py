"""Grammars that strangers wrote are compiled once in a process of their own, before the engine has to.

The compiler bounds most of what it does, not all of it: a schema of a few kilobytes can keep it busy for minutes. A
thread could not be stopped. A process can: it has a time for each grammar, and a memory.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections import OrderedDict
from contextlib import suppress
from dataclasses import replace

from onebase.serve.api.errors import ApiError, bad_request, not_ready
from onebase.serve.api.fair_turns import FairTurns
from onebase.serve.engine.grammar_bounds import MAX_SOURCE
from onebase.serve.engine.messages import Grammar

QUICK_SECONDS = 0.5  # most grammars that people write take milliseconds: the others do not keep those waiting
SECONDS = 5.0  # for one grammar; of processor time, like the above: a busy machine does not change what is refused
SLOWNESS = 20  # seconds on the clock for each of processor time, at most
START_SECONDS = 60.0  # for a process to start, which has to import the compiler
REMEMBERED = 256  # grammars that were tried, good or bad; each has at most MAX_SOURCE characters
_COMMAND = (sys.executable, "-P", "-m", "onebase.serve.api.grammar_process")
_TOO_DEAR = "it takes more memory or recursion than the compiler has"


class GrammarChecker:
    """Used on the event loop. Two processes, started with the first grammars: one for those that take no time, and one
    for those that the first gave up."""

    def __init__(self, seconds: float = SECONDS, quick_seconds: float = QUICK_SECONDS) -> None:
        self._seconds = seconds
        self._workers = (_Worker(min(quick_seconds, seconds)), _Worker(seconds))
        self._refusals: OrderedDict[Grammar, str | None] = OrderedDict()  # None: it is good. The latest at the end

    async def checked(self, grammar: Grammar, param: str, tenant: str = "", told: str | None = None) -> Grammar:
        """The grammar, which knows its ``param`` now: the field that it came from. Tenants take turns.

        Raises ApiError 400 on ``param``; its message calls the field ``told``. GrammarTooSlow is one of them.
        """
        try:
            refusal = self._refusals[grammar] if grammar in self._refusals else await self._tried(grammar, tenant)
        except _Killed:  # by the operator or the kernel: another time it may do
            raise bad_request(f"{told or param}: {_TOO_DEAR}.", param, "invalid_grammar") from None
        self._remember(grammar, refusal)
        if refusal is not None:
            kind = GrammarTooSlow if refusal == self._too_slow else ApiError
            raise kind(400, f"{told or param}: {refusal.rstrip('.')}.", param=param, code="invalid_grammar")
        return replace(grammar, param=param)

    async def close(self) -> None:
        """Also ends the processes of grammars that are under way."""
        for worker in self._workers:
            await worker.stop()

    async def _tried(self, grammar: Grammar, tenant: str) -> str | None:
        for worker in self._workers:
            try:
                return await worker.refusal(grammar, tenant)
            except _OverTime:
                continue
        return self._too_slow

    @property
    def _too_slow(self) -> str:
        return f"it takes longer than {self._seconds:g} seconds of processor time to compile; make it simpler"

    def _remember(self, grammar: Grammar, refusal: str | None) -> None:
        if len(grammar.source) > MAX_SOURCE:
            return
        self._refusals[grammar] = refusal
        self._refusals.move_to_end(grammar)
        while len(self._refusals) > REMEMBERED:
            self._refusals.popitem(last=False)


class GrammarTooSlow(ApiError):
    """400: it had all the time that one grammar has."""


class _OverTime(Exception):
    """A grammar had all the time that there is."""


class _Killed(Exception):
    """Whoever killed the process did not do so for its time."""


class _Worker:
    """One process, one grammar at a time. A new one is started after a runaway or a crash."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._turns = FairTurns()
        self._process: Process | None = None

    async def refusal(self, grammar: Grammar, tenant: str) -> str | None:
        """Why the grammar is not compiled; None where it is. Raises _OverTime, and _Killed if that happens twice."""
        async with self._turns.turn(tenant):
            try:
                return await self._refusal(grammar)
            except _Killed:
                return await self._refusal(grammar)

    async def _refusal(self, grammar: Grammar) -> str | None:
        answer = b""
        process = await self._running()
        try:
            answer = await asyncio.wait_for(_asked(process, grammar, self._seconds), self._seconds * SLOWNESS)
        except TimeoutError:
            raise _OverTime from None
        finally:
            if not answer:  # also where the client left: the process is in the middle of something
                await self.stop()
        if answer:
            refusal: str | None = json.loads(answer)
            return refusal
        if process.returncode == -signal.SIGPROF:
            raise _OverTime
        if process.returncode == -signal.SIGKILL:
            raise _Killed
        return _TOO_DEAR

    async def _running(self) -> Process:
        """Raises ApiError 503 where none can be started."""
        if self._process is not None and self._process.returncode is not None:
            await self.stop()
        if self._process is None:
            self._process = await asyncio.create_subprocess_exec(*_COMMAND, stdin=PIPE, stdout=PIPE, stderr=DEVNULL)
            await self._warmed(self._process)
        return self._process

    async def _warmed(self, process: Process) -> None:
        answer = b""
        try:
            answer = await asyncio.wait_for(_asked(process, Grammar("regex", "a"), START_SECONDS), START_SECONDS)
        except TimeoutError:
            raise not_ready("The process that tries grammars takes too long to start.") from None
        finally:
            if not answer:
                await self.stop()
        if not answer:
            raise _Killed if process.returncode == -signal.SIGKILL else not_ready("No grammar can be tried now.")

    async def stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            if process.returncode is None:
                process.kill()
            await process.wait()


async def _asked(process: Process, grammar: Grammar, seconds: float) -> bytes:
    """The answer's line; empty where the process died, and ``returncode`` says how."""
    if process.stdin is None or process.stdout is None:
        raise RuntimeError("a grammar process has pipes")
    answer = b""
    with suppress(BrokenPipeError, ConnectionResetError):
        if not process.stdin.is_closing():
            process.stdin.write(json.dumps([grammar.kind, grammar.source, seconds]).encode() + b"\n")
            await process.stdin.drain()
            answer = await process.stdout.readline()
    if answer.endswith(b"\n"):
        return answer
    await process.wait()  # before anybody kills it: of asyncio's own loop that would lose how it ended
    return b""

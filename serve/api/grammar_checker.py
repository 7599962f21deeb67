"""Grammars that strangers wrote are compiled once in a process of their own, before the engine has to.

The compiler bounds most of what it does, not all of it: a schema of a few kilobytes can keep it busy for minutes. A
thread could not be stopped. A process can: it has a time for each grammar, and a memory.
"""

from __future__ import annotations

import asyncio
import json
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections import OrderedDict

from onebase.serve.api.errors import bad_request
from onebase.serve.engine.messages import Grammar

CHECKERS = 2
SECONDS = 5.0  # for one grammar; those that people write take milliseconds
START_SECONDS = 60.0  # for a process to start, which has to import the compiler
REMEMBERED = 256  # grammars that were found good; each has at most MAX_SOURCE characters
_COMMAND = (sys.executable, "-P", "-m", "onebase.serve.api.grammar_process")


class GrammarChecker:
    """Used on the event loop. Processes are started with the first grammars."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self._workers = [_Worker(seconds) for _ in range(CHECKERS)]
        self._idle: asyncio.Queue[_Worker] = asyncio.Queue()
        for worker in self._workers:
            self._idle.put_nowait(worker)
        self._good: OrderedDict[Grammar, None] = OrderedDict()  # the latest at the end

    async def checked(self, grammar: Grammar, param: str) -> Grammar:
        """The grammar itself. Raises ApiError 400 on ``param``, the field that it came from."""
        if grammar not in self._good:
            await self._check(grammar, param)
            self._good[grammar] = None
        self._good.move_to_end(grammar)
        while len(self._good) > REMEMBERED:
            self._good.popitem(last=False)
        return grammar

    async def _check(self, grammar: Grammar, param: str) -> None:
        worker = await self._idle.get()
        try:
            refusal = await worker.refusal(grammar)
        finally:
            self._idle.put_nowait(worker)
        if refusal is not None:
            raise bad_request(f"{param}: {refusal.rstrip('.')}.", param, "invalid_grammar")

    async def close(self) -> None:
        """Also ends the processes of grammars that are under way."""
        for worker in self._workers:
            await worker.stop()


class _Worker:
    """One process, one grammar at a time. A new one is started after a runaway or a crash."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._process: Process | None = None

    async def refusal(self, grammar: Grammar) -> str | None:
        """Why the grammar is not compiled; None where it is."""
        done = False
        try:
            process = await self._running()
            answer = await asyncio.wait_for(_asked(process, grammar), self._seconds)
            done = bool(answer)
        except TimeoutError:
            return f"it takes longer than {self._seconds:g} seconds to compile; make it simpler"
        except (BrokenPipeError, ConnectionResetError):
            answer = b""
        finally:
            if not done:  # also where the client left: the process is in the middle of something
                await self.stop()
        return json.loads(answer) if answer else "it takes more memory or recursion than the compiler has"

    async def _running(self) -> Process:
        if self._process is None:
            self._process = await asyncio.create_subprocess_exec(*_COMMAND, stdin=PIPE, stdout=PIPE, stderr=DEVNULL)
            await asyncio.wait_for(_asked(self._process, Grammar("regex", "a")), START_SECONDS)
        return self._process

    async def stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            if process.returncode is None:
                process.kill()
            await process.wait()


async def _asked(process: Process, grammar: Grammar) -> bytes:
    """The answer's line; empty where the process died."""
    if process.stdin is None or process.stdout is None:
        raise RuntimeError("a grammar process has pipes")
    process.stdin.write(json.dumps([grammar.kind, grammar.source]).encode() + b"\n")
    await process.stdin.drain()
    return await process.stdout.readline()

"""Chat templates rendered in a process of their own, which is ended where one takes too long."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import IO, Any, cast

MAX_SLOW = 64  # templates that are remembered for it
CPU_SECONDS = 2.0  # of processor time: a slow or busy machine does not change what is refused


class TemplateFailed(Exception):
    """A template that does not compile, does not accept the messages, or is over a limit. The message says which."""


class Renderer:
    """One process, started at the first use and again after it was ended. Renderings take turns.

    Thread-safe. ``close`` ends the process, whatever it does. patience: a template that took too long so many times in
    a row is not tried again, so that others wait for it no more; None: it always is.
    """

    def __init__(self, cpu_seconds: float = CPU_SECONDS, patience: int | None = None) -> None:
        self._cpu_seconds = cpu_seconds
        self._patience = patience
        self._slow: dict[str, int] = {}  # template -> times in a row
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="render")
        self._child: subprocess.Popen[bytes] | None = None
        self._is_closing = False

    async def render(self, template: str, context: Mapping[str, Any], max_chars: int) -> str:
        """Raises TemplateFailed."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self.run, template, context, max_chars)

    async def check(self, template: str) -> None:
        """Whether it compiles. Raises TemplateFailed."""
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._thread, self.run, template, None, 0)

    def run(self, template: str, context: Mapping[str, Any] | None, max_chars: int) -> str:
        """Blocking; one call at a time. See ``render``; without a context the template is only compiled."""
        if self._patience is not None and self._slow.get(template, 0) >= self._patience:
            raise TemplateFailed(f"it took more than {self._cpu_seconds:g} s of processor time too often")
        job = {"template": template, "context": context, "max_chars": max_chars, "cpu": self._cpu_seconds}
        told, code = self._told(json.dumps(job).encode() + b"\n")
        if code == -signal.SIGPROF:
            self._note_slow(template)
            raise TemplateFailed(f"it takes more than {self._cpu_seconds:g} s of processor time")
        if not told:
            raise TemplateFailed(f"the process that rendered it ended ({code})")
        self._slow.pop(template, None)
        answer: dict[str, str] = json.loads(told)
        if "error" in answer:
            raise TemplateFailed(answer["error"])
        return answer["text"]

    def close(self) -> None:
        """What is being rendered fails."""
        self._is_closing = True
        self._thread.shutdown(wait=False, cancel_futures=True)
        if self._child is not None:
            self._child.kill()
        self._thread.shutdown(wait=True)
        self._reap()

    def _told(self, line: bytes) -> tuple[bytes, int | None]:
        """The child's answer; or none, and how it ended. Where it was killed, which no template can do, one more try is
        made."""
        told = self._ask(line)
        code = None if told else self._reap()
        if code == -signal.SIGKILL and not self._is_closing:
            told = self._ask(line)
            code = None if told else self._reap()
        return told, code

    def _ask(self, line: bytes) -> bytes:
        """The child's answer; empty where it ended."""
        if self._child is None or self._child.poll() is not None:
            self._reap()
            self._child = _start()
        stdin, stdout = _pipes(self._child)
        try:
            stdin.write(line)
            stdin.flush()
            told = stdout.readline()
        except BrokenPipeError:
            return b""
        return told if told.endswith(b"\n") else b""  # it may end within its answer

    def _note_slow(self, template: str) -> None:
        self._slow[template] = self._slow.pop(template, 0) + 1
        if len(self._slow) > MAX_SLOW:
            del self._slow[next(iter(self._slow))]

    def _reap(self) -> int | None:
        child, self._child = self._child, None
        if child is None:
            return None
        for pipe in _pipes(child):
            with suppress(BrokenPipeError):  # what was buffered for a process that has ended
                pipe.close()
        return child.wait()


def _pipes(child: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes]]:
    return cast(IO[bytes], child.stdin), cast(IO[bytes], child.stdout)


def _start() -> subprocess.Popen[bytes]:
    command = [sys.executable, "-I", "-m", "onebase.serve.api.render_child"]
    environment = {"PATH": os.defpath, "TZ": os.environ.get("TZ", "")}
    return subprocess.Popen(  # noqa: S603
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={k: v for k, v in environment.items() if v}
    )

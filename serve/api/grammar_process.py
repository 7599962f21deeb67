"""The process that tries grammars: ``python -m onebase.serve.api.grammar_process``. What kills it harms nobody else.

A line in, a line out: ``[kind, source, seconds]``, and why the grammar is refused or null. After so many seconds of
processor time the kernel ends the process. It also ends with its standard input.
"""

from __future__ import annotations

import json
import resource
import signal
import sys

from onebase.adapters.errors import RequestRejected
from onebase.serve.engine.deep_threads import deep_threads
from onebase.serve.engine.grammar import check_grammar
from onebase.serve.engine.messages import Grammar

MEMORY_BYTES = 3 << 30  # of address space


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with deep_threads(1, "check") as threads:
        for line in sys.stdin.buffer:
            kind, source, seconds = json.loads(line)
            signal.setitimer(signal.ITIMER_PROF, seconds)
            refusal = threads.submit(_refusal, Grammar(kind, source)).result()
            signal.setitimer(signal.ITIMER_PROF, 0)
            sys.stdout.write(json.dumps(refusal) + "\n")
            sys.stdout.flush()


def _refusal(grammar: Grammar) -> str | None:
    try:
        check_grammar(grammar)
    except RequestRejected as error:
        return error.message
    return None


if __name__ == "__main__":
    main()

"""The process that tries grammars: ``python -m onebase.serve.api.grammar_process``. What kills it harms nobody else.

A line in, a line out: ``[kind, source]``, and why the grammar is refused or null. Ends with its standard input.
"""

from __future__ import annotations

import json
import resource
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
            grammar = Grammar(*json.loads(line))
            sys.stdout.write(json.dumps(threads.submit(_refusal, grammar).result()) + "\n")
            sys.stdout.flush()


def _refusal(grammar: Grammar) -> str | None:
    try:
        check_grammar(grammar)
    except RequestRejected as error:
        return error.message
    return None


if __name__ == "__main__":
    main()

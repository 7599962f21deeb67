"""The process that renders chat templates: started by rendering.py and by nobody else.

``python -m onebase.serve.api.render_child`` reads a JSON object a line, ``{"template", "context", "max_chars",
"cpu"}``, and answers each with ``{"text"}`` or ``{"error"}``. A template is a program from a stranger. It runs in
jinja2's sandbox, within a budget of memory, and for ``cpu`` seconds of processor time, after which the kernel ends the
process: a loop, or one call that never returns, can be ended in no other way.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Environment, Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY_BYTES = 256 << 20  # beside what the process has when it starts
KEPT_TEMPLATES = 64


class GenerationTag(Extension):
    """``{% generation %}`` marks what training learns from; here its body is written as it is."""

    tags = frozenset({"generation"})  # type: ignore[assignment]  # jinja only looks names up in it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """transformers' filter of this name: jinja's own would escape characters of HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def environment() -> Environment:
    """As transformers compiles chat templates."""
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols])
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return made


def render(compiled: Callable[[str], Template], template: str, context: Mapping[str, Any], max_chars: int) -> str:
    """Raises TemplateError for a text of more than ``max_chars``, UnicodeEncodeError for one that holds half of a
    surrogate pair, and whatever the template raises."""
    parts: list[str] = []
    left = max_chars
    for part in compiled(template).generate(**context):
        left -= len(part)
        if left < 0:
            raise TemplateError(f"it writes more than {max_chars} characters")
        parts.append(part)
    text = "".join(parts)
    text.encode()
    return text


def answer(compiled: Callable[[str], Template], line: bytes) -> dict[str, str]:
    """``context`` null: the template is only compiled."""
    job = json.loads(line)
    try:
        signal.setitimer(signal.ITIMER_PROF, job["cpu"])
        if job["context"] is None:
            compiled(job["template"])
            return {"text": ""}
        return {"text": render(compiled, job["template"], job["context"], job["max_chars"])}
    except MemoryError:
        return {"error": f"it needs more than {MEMORY_BYTES >> 20} MiB of memory"}
    except RecursionError:
        return {"error": "it nests too deeply"}
    except UnicodeEncodeError:
        return {"error": "it writes half of a surrogate pair, which is no character"}
    except Exception as error:  # templates raise whatever their expressions raise; all of it is about the messages
        return {"error": str(error)[:500] or type(error).__name__}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def limit() -> None:
    """Memory as said above; no files, so that a hole in the sandbox leads nowhere."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    memory = pages * resource.getpagesize() + MEMORY_BYTES
    for kind, most in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        hard = resource.getrlimit(kind)[1]
        lowered = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (lowered, lowered))


def main() -> None:
    compiled = lru_cache(KEPT_TEMPLATES)(environment().from_string)
    limit()
    for line in sys.stdin.buffer:
        sys.stdout.buffer.write(json.dumps(answer(compiled, line)).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()

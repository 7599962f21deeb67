"""How models write calls of tools. The format of a model is read off its chat template."""

from __future__ import annotations

import re
from dataclasses import dataclass

ARGUMENTS, PARAMETERS = "arguments", "parameters"


@dataclass(frozen=True, slots=True)
class Syntax:
    """One format of calls, each of them a JSON object with ``name`` and ``arguments`` (or ``parameters``).

    opening: announces calls. bare: an answer may start with a call without it. listed: calls may stand in a JSON list.
    separator: between two calls after one opening. closing: after the last of them. key: of the arguments, where we
    write a call. tail: the opening as a prompt ends with it, to force a call. markers: what may be tokens of the
    vocabulary, and has to be seen even if they are special ones. short_ids: the template takes call ids of
    nine letters and digits only.
    """

    name: str
    opening: str
    closing: str = ""
    separator: str = ""
    bare: bool = False
    listed: bool = False
    key: str = ARGUMENTS
    tail: str = ""
    markers: tuple[str, ...] = ()
    short_ids: bool = False


HERMES = Syntax(
    "hermes",
    "<tool_call>",
    "</tool_call>",
    tail="<tool_call>\n",
    markers=("<tool_call>", "</tool_call>"),
)
LLAMA = Syntax(
    "llama",
    "<|python_tag|>",
    separator=";",
    bare=True,
    key=PARAMETERS,
    markers=("<|python_tag|>",),
)
MISTRAL = Syntax(
    "mistral",
    "[TOOL_CALLS]",
    "]",
    separator=",",
    listed=True,
    tail="[TOOL_CALLS]",
    markers=("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
    short_ids=True,
)

_TOOLS = re.compile(r"\{[{%][^}]*\btools\b")


def syntax_of(template: str) -> Syntax | None:
    """The format that a template teaches; None where it does not show tools, or in a format that is not known."""
    if _TOOLS.search(template) is None:
        return None
    if MISTRAL.opening in template:
        return MISTRAL
    if HERMES.opening in template:
        return None if "<function=" in template else HERMES
    return LLAMA if LLAMA.opening in template or '"parameters"' in template else None

"""Writes docs/adapters.md: every family that is served, every method that the surveys name, every refusal, every cost.

`python -m onebase.adapters.catalog docs/adapters.md`; a test compares the file with ``page``.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from onebase.adapters.costs import COSTS
from onebase.adapters.family_names import HUB_REFUSALS
from onebase.adapters.formats import families
from onebase.adapters.formats.refusals import REFUSED_FAMILIES, REFUSED_OPTIONS
from onebase.adapters.formats.register import Family
from onebase.adapters.program import LowRank, TokenLowRank
from onebase.adapters.survey import Fate, methods
from onebase.kernels.ops.instruction import Instruction

_INTRO = """\
# Adapters

Written by `python -m onebase.adapters.catalog docs/adapters.md`; do not edit it by hand.

Every adapter is compiled to instructions at modules of the base, and each row of a batch runs its own, beside rows of
other adapters and of the plain base. What is served is what HF PEFT (or the library that wrote the file) computes, to
1e-4 on log-probabilities in float32; whatever cannot be is refused by name. `onebase check ADAPTER --model MODEL` says
which of the two an adapter is, and what it would cost.
"""
_FATES = """\
*Served*: a file of the method, or of the library that trains it, is served. *Converted*: the method has no format of
its own, and what it leaves behind can be written as a file of that family, exactly. *Refused*: for the reason given.
The names are those of Xu et al. (2312.12148), Ding et al. (2203.06904) and LLM-Adapters (2304.01933).
"""
_TRADES = """\
FLOPs of one token at one linear of width h, and elements of one adapter there. The base's own linear takes 2h^2 and
h^2.

- Everything whose exact rank is small becomes one LowRank, whatever its family: it has kernels of its own, and all
  programs of a batch share a launch. LoHa's rank r becomes r^2; KaSA's, PiSSA's and OLoRA's 2r; GraLoRA's its number of
  blocks times r. A truncated decomposition of the rest would not be the adapter: its error is as large as the change.
- Instructions before the base (ScaleIn, BlockRotateIn, ButterflyIn, InputBottleneck) give some rows another input: the
  base reads a changed copy of the batch. Low-rank terms read the plain input, so q, k and v still share one shrink.
- What needs the base's weights (PiSSA, DoRA's norms, HRA, PSOFT, OSF and others) is computed once, at load.
- Dense costs a second base linear for its rows, and its memory. One dense adapter of a 7B model takes as much of the
  arena as thousands of LoRAs, which are evicted to make room for it.
- Shared matrices (VeRA and its kin) are held once, found by their content, and freed with their last adapter.
- Virtual tokens and prefixes count for pages and for the context, in each of their sequences.
- Nonlinear instructions (bottlenecks, prefixes) take the scales 0 and 1 only, and two of them at one place do not add
  up; linear ones take any scale, and add up.
"""


def page() -> str:
    """The whole document."""
    parts = [_INTRO, "## Families", *_families(), "## What the surveys name", _FATES, *_survey()]
    parts += ["## Refused", *_refusals(), "## What an instruction costs", _TRADES, *_costs()]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def instructions() -> dict[str, type]:
    """Every kind of instruction that a program may hold, by name, but for add_out, which is a bare vector."""
    kinds = list(_below(Instruction))
    parents = {parent.__name__ for kind in kinds for parent in kind.__mro__[1:]}  # by name: slots leave drafts behind
    found: dict[str, type] = {"LowRank": LowRank, "TokenLowRank": TokenLowRank}
    return found | {kind.__name__: kind for kind in kinds if kind.__name__ not in parents}


def _below(kind: type) -> Iterator[type]:
    children: list[type] = kind.__subclasses__()
    for child in children:
        yield child
        yield from _below(child)


def _families() -> Iterator[str]:
    rows = [
        (f"`{one.peft_type}`", _title(one), ", ".join(one.covers), _names(one.instructions), one.cost, one.note)
        for one in families()
    ]
    yield _table(("peft_type", "method", "covers", "instructions", "cost", "notes"), rows)


def _title(family: Family) -> str:
    link = f"https://arxiv.org/abs/{family.paper}"
    return f"[{family.title}]({link})" if re.fullmatch(r"\d{4}\.\d{4,5}", family.paper) else family.title


def _survey() -> Iterator[str]:
    for fate in Fate:
        rows = [(one.name, one.group, _names(one.through), one.how) for one in methods() if one.fate is fate]
        header = ("method", "kind", "through", "how")
        yield f"### {fate.capitalize()}"
        if fate is Fate.REFUSED:
            yield _table(("method", "kind", "why"), [(name, group, why) for name, group, _, why in rows])
        else:
            yield _table(header, rows)


def _refusals() -> Iterator[str]:
    rows = [(one.title, f"`peft_type` {name}", one.reason, one.way_out) for name, one in REFUSED_FAMILIES.items()]
    for option in REFUSED_OPTIONS:
        shown = ", ".join(f"`{name}`" for name in option.fields)
        rows.append((option.title, f"{option.family}: {shown}", option.reason, option.way_out))
    for architecture, text in HUB_REFUSALS.items():
        why, _, way_out = text.partition("; ")
        rows.append((f"AdapterHub's {architecture}", "`config`: `architecture`", _sentence(why), _sentence(way_out)))
    yield _table(("what", "named by", "why", "way out"), rows)


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _costs() -> Iterator[str]:
    rows = []
    for name, cost in COSTS.items():
        kind = instructions().get(name)
        rows.append((name, _first_sentence(kind), cost.flops, cost.elements, cost.when))
    yield _table(("instruction", "what it does", "FLOPs", "elements", "when"), rows)


def _first_sentence(kind: type | None) -> str:
    text = inspect.cleandoc(kind.__doc__ or "") if kind is not None else "y += a vector"
    first = re.split(r"(?<=[.)])\s+(?=[A-Z][a-z])|\.\s+(?=\w+: \[)|\n\n", text)[0]
    return " ".join(first.split()).replace("``", "`").removesuffix(".")


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")

"""``NAME:NUMBER:NUMBER`` on the command line -> a choice and its numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TypeVar

T = TypeVar("T")


def parse(what: str, text: str, choices: Mapping[str, Callable[..., T]]) -> T:
    """The choice called by the part before the first colon, made of the numbers behind it.

    choices: forms as shown to the user, such as ``gamma:CV``, with what makes each of its numbers. Raises ValueError
    that names ``what`` and the forms allowed.
    """
    name, *parts = text.split(":")
    allowed = f"{what}: {text!r}; allowed: {', '.join(choices)}"
    for form, make in choices.items():
        shown, *wanted = form.split(":")
        if shown == name and len(wanted) == len(parts):
            try:
                return make(*map(_number, parts))
            except ValueError as error:
                raise ValueError(f"{allowed} ({error})") from None
    raise ValueError(allowed)


def positive(what: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{what} must be above 0")


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not finite")
    return value

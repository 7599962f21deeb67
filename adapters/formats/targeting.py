"""Which modules a config's target_modules names, for formats whose tensors do not say it. As PEFT decides it.

A list names modules by their whole path or its end; of the latter, layers_to_transform (with layers_pattern) keeps
those of some layers. A string is a regular expression for whole paths. It comes from strangers, so it never meets a
backtracking matcher.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from onebase.adapters.base import BaseModel, Site, SiteKind
from onebase.adapters.errors import AdapterRejected
from onebase.adapters.formats.automaton import PatternError, parse_pattern
from onebase.adapters.formats.fields import Fields, as_names, refused
from onebase.adapters.strict_json import JsonValue

_PLACE = re.compile(r"[A-Za-z0-9_.]+")
_MAX_CHARS = 4096
Matches = Callable[[str], bool]


def read_targets(fields: Fields, base: BaseModel) -> list[Site]:
    """The targeted linear sites, in the order of the model's modules. Raises AdapterRejected, also where a module is
    named that cannot be adapted."""
    matches = _read(fields)
    for path, reason in base.refused.items():
        if matches(path):
            raise AdapterRejected(f"target_modules names {path}, which cannot be adapted: {reason}", param=path)
    sites = [site for path, site in base.sites.items() if matches(path)]
    for site in sites:
        if site.kind is not SiteKind.LINEAR:
            message = f"target_modules names {site.path}, a {site.kind}; this family adapts linear modules."
            raise AdapterRejected(message, param="target_modules")
    if not sites:
        raise AdapterRejected("target_modules names no module of the base.", param="target_modules")
    return sites


def _read(fields: Fields) -> Matches:
    targets, layers, patterns = (fields.take(n) for n in ("target_modules", "layers_to_transform", "layers_pattern"))
    if isinstance(targets, str):
        return _by_expression(targets)
    names = as_names("target_modules", targets)
    ends = tuple(f".{name}" for name in names)
    wanted = _layer_numbers(layers)
    places = _places(patterns)

    def matches(path: str) -> bool:
        return path in names or (path.endswith(ends) and (not wanted or _layer(path, places) in wanted))

    return matches


def _by_expression(pattern: str) -> Matches:
    if len(pattern) > _MAX_CHARS:
        raise refused("target_modules", pattern, f"at most {_MAX_CHARS} characters are allowed")
    try:
        automaton = parse_pattern(f"^({pattern})$")
    except PatternError as error:
        raise refused("target_modules", pattern, str(error)) from None

    def matches(path: str) -> bool:
        try:
            return automaton.matches(path)
        except PatternError as error:
            raise refused("target_modules", pattern, str(error)) from None

    return matches


def _layer_numbers(value: JsonValue) -> frozenset[int]:
    numbers = value if isinstance(value, list) else [] if value is None else [value]
    found = [number for number in numbers if isinstance(number, int) and not isinstance(number, bool)]
    if len(found) < len(numbers):
        raise refused("layers_to_transform", value, "it must be null, an integer or a list of them")
    return frozenset(found)


def _places(value: JsonValue) -> tuple[str, ...]:
    places = as_names("layers_pattern", [value] if isinstance(value, str) and value else value or None)
    for place in places:
        if not _PLACE.fullmatch(place):
            raise refused("layers_pattern", place, "plain names of modules are served")
    return places


def _layer(path: str, places: Sequence[str]) -> int | None:
    """The number of the layer that holds a module: behind one of the places, or the first one behind two names."""
    parts = path.split(".")
    if not places:
        return next((int(part) for part in parts[2:-1] if part.isdecimal()), None)
    for place in places:
        behind = place.split(".")
        for at in range(len(parts) - len(behind) - 1):
            number = parts[at + len(behind)]
            if parts[at : at + len(behind)] == behind and number.isdecimal():
                return int(number)
    return None

"""A config's fields, taken one by one: a family says what each means, and what nobody took must be unset.

PEFT warns about fields that it does not know and goes on. Here an unknown field that is set refuses the adapter, since
it may change the maths.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from onebase.adapters.check import CONFIG_FILE
from onebase.adapters.errors import AdapterRejected
from onebase.adapters.strict_json import JsonValue

MAX_RANK = 4096
MAX_NAMES = 1024
_ALWAYS_HARMLESS = (
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_type",
    "peft_version",
    "revision",
    "task_type",
)
_STRING_OR_NULL = ("base_model_name_or_path", "peft_version", "revision", "task_type")


class Fields:
    """The fields of one adapter_config.json. Every method raises AdapterRejected naming the field."""

    def __init__(self, values: Mapping[str, JsonValue]) -> None:
        self._left = dict(values)
        for name in _STRING_OR_NULL:
            if not isinstance(value := self._left.get(name), str | None):
                raise refused(name, value, "it must be a string or null")
        self.task_type = self._left.get("task_type")  # says what a saved head is for
        version = self._left.get("peft_version")
        self.peft_version = version if isinstance(version, str) else ""
        self.ignore(_ALWAYS_HARMLESS)

    def integer(self, name: str, low: int, high: int, default: int | None = None) -> int:
        """With a default, the field may be absent or null."""
        value = self._given(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise refused(name, value, f"it must be an integer from {low} to {high}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """With a default, the field may be absent or null."""
        return as_number(name, self._given(name, default))

    def flag(self, name: str, *, default: bool = False) -> bool:
        """null counts as absent."""
        value = self._left.pop(name, None)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise refused(name, value, "it must be true or false")
        return value

    def numbers(self, name: str) -> dict[str, float]:
        """A pattern table {regex: number}; absent and null are empty."""
        value = self._left.pop(name, None)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise refused(name, value, "it must map patterns to numbers")
        return {key: as_number(f"{name}[{key[:100]!r}]", item) for key, item in value.items()}

    def choice(self, name: str, allowed: Collection[JsonValue], default: JsonValue, reason: str) -> JsonValue:
        value = self._left.pop(name, default)
        if not any(value == item and type(value) is type(item) for item in allowed):
            raise refused(name, value, reason)
        return value

    def take(self, name: str, default: JsonValue = None) -> JsonValue:
        """The value as it stands, for fields that have more than one type: the caller checks it."""
        return self._left.pop(name, default)

    def section(self, name: str) -> Fields:
        """A nested object's fields. Whoever takes it has to ``finish`` it."""
        value = self._required(name)
        if not isinstance(value, dict):
            raise refused(name, value, "it must be an object")
        return Fields(value)

    def names(self, name: str) -> tuple[str, ...]:
        """A list of at most MAX_NAMES names; absent and null are empty."""
        return as_names(name, self._left.pop(name, None))

    def ignore(self, names: Collection[str]) -> None:
        """Fields that cannot change what the adapter computes, whatever they say."""
        for name in names:
            self._left.pop(name, None)

    def must_be_unset(self, reasons: Mapping[str, str]) -> None:
        for name, reason in reasons.items():
            if value := self._left.pop(name, None):
                raise refused(name, value, reason)

    def finish(self) -> None:
        """Whatever is left is unknown: false, null, zero and empty are fine, anything else is not."""
        for name, value in self._left.items():
            if value:
                raise refused(name, value, "the field is unknown and set, so it may change what the adapter computes")

    def _given(self, name: str, default: float | None) -> JsonValue:
        if default is not None and self._left.get(name) is None:
            self._left.pop(name, None)
            return default
        return self._required(name)

    def _required(self, name: str) -> JsonValue:
        if name not in self._left:
            raise AdapterRejected(f"{CONFIG_FILE} has no {name}; it decides what the adapter computes.", param=name)
        return self._left.pop(name)


def as_number(name: str, value: JsonValue) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise refused(name, value, "it must be a number")
    if not -1e9 <= value <= 1e9:
        raise refused(name, value, "it must lie between -1e9 and 1e9")
    return float(value)


def as_names(name: str, value: JsonValue) -> tuple[str, ...]:
    items = [] if value is None else value
    if not isinstance(items, list) or len(items) > MAX_NAMES:
        raise refused(name, value, f"it must be null or a list of at most {MAX_NAMES} names")
    found = tuple(item for item in items if isinstance(item, str) and item)
    if len(found) < len(items):
        raise refused(name, value, "names are strings, and not empty")
    return found


def refused(name: str, value: JsonValue, reason: str) -> AdapterRejected:
    shown = repr(value)
    if len(shown) > 100:
        shown = shown[:100] + "..."
    return AdapterRejected(f"{CONFIG_FILE}: {name[:200]!r} is {shown}: {reason}.", param=name[:200])

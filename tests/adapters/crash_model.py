"""What a registry has to hold after a sequence of changes, in plain dictionaries: the model of the crash test."""

from __future__ import annotations

import copy
from typing import Any


class Refused(Exception):
    """The registry has to refuse this change."""


class Model:
    """Names as state_of in crash_child.py writes them, with ``previous`` beside; ``apply`` changes them."""

    def __init__(self) -> None:
        self.names: dict[str, dict[str, Any]] = {}
        self.last: dict[str, int] = {}
        self.imports: list[list[Any]] = []

    def state(self) -> dict[str, Any]:
        names = {name: {key: entry[key] for key in entry if key != "previous"} for name, entry in self.names.items()}
        deleted = {name: last for name, last in self.last.items() if name not in self.names}
        return {"names": names, "deleted": deleted, "imports": self.imports}

    def after(self, operation: list[Any]) -> Model:
        """A copy with the operation done. Raises Refused."""
        other = copy.deepcopy(self)
        other.apply(operation)
        return other

    def reopened(self) -> Model:
        """A restart takes imports that were being checked from the start again."""
        other = copy.deepcopy(self)
        other.imports = [[n, s, "fetching" if state == "checking" else state, v] for n, s, state, v in self.imports]
        return other

    def apply(self, operation: list[Any]) -> Any:
        verb, *arguments = operation
        return getattr(self, verb)(*arguments)

    def push(self, name: str, digest: str) -> int:
        self._refuse_alias(name)
        entry = self.names.get(name)
        if entry is not None and [entry["current"], digest] in entry["versions"]:
            return int(entry["current"])
        version = self.last[name] = self.last.get(name, 0) + 1
        if entry is None:
            entry = self.names[name] = {"pinned": False, "labels": {}, "aliases": {}, "versions": [], "current": None}
        entry["previous"], entry["current"] = entry["current"], version
        entry["versions"].append([version, digest])
        return version

    def rollback(self, name: str, version: int | None) -> int:
        entry = self._entry(name)
        numbers = [number for number, _ in entry["versions"]]
        if version is None:
            lower = [number for number in numbers if number < entry["current"]]
            choices = [entry["previous"]] * (entry["previous"] in numbers) + lower[::-1]
            version = choices[0] if choices else None
        if version not in numbers:
            raise Refused
        if version != entry["current"]:
            entry["previous"], entry["current"] = entry["current"], version
        return version

    def pin(self, name: str, pinned: bool) -> int:
        self._entry(name)["pinned"] = pinned
        return int(self._entry(name)["current"])

    def label(self, name: str, labels: dict[str, str | None]) -> int:
        merged = {**self._entry(name)["labels"], **labels}
        self._entry(name)["labels"] = {key: value for key, value in merged.items() if value is not None}
        return int(self._entry(name)["current"])

    def alias(self, name: str, aliases: dict[str, int | None], replace: bool) -> int:
        entry = self._entry(name)
        numbers = [None, *(number for number, _ in entry["versions"])]
        owned = {alias for other, it in self.names.items() if other != name for alias in it["aliases"]}
        if any(alias in self.names or alias in owned or number not in numbers for alias, number in aliases.items()):
            raise Refused
        entry["aliases"] = aliases if replace else {**entry["aliases"], **aliases}
        return int(entry["current"])

    def delete(self, name: str) -> list[list[Any]]:
        imports = [item for item in self.imports if item[0] == name and item[2] != "deleted"]
        if name not in self.names and not imports:
            raise Refused
        for item in imports:
            item[2] = "deleted"
        entry = self.names.pop(name, {"versions": []})
        return [[name, number] for number, _ in entry["versions"]]

    def gc(self, keep: int | None) -> list[list[Any]]:
        self.imports = [item for item in self.imports if item[2] in ("fetching", "checking")]
        gone = []
        for name, entry in sorted(self.names.items()):
            stay = {entry["current"], entry["previous"], *entry["aliases"].values()}
            old = entry["versions"][: max(0, len(entry["versions"]) - keep)] if keep is not None else []
            going = [item for item in old if item[0] not in stay]
            entry["versions"] = [item for item in entry["versions"] if item not in going]
            gone += [[name, number] for number, _ in going]
        return gone

    def begin_import(self, name: str, source: str) -> str:
        self._refuse_alias(name)
        under_way = self._unfinished(name)
        if under_way and under_way[1] != source:
            raise Refused
        if not under_way:
            self.imports.append([name, source, "fetching", None])
        return source

    def set_import(self, name: str, state: str) -> None:
        under_way = self._unfinished(name)
        if under_way is None:
            raise Refused
        under_way[2] = state

    def finish_import(self, name: str, digest: str) -> int:
        under_way = self._unfinished(name)
        version = self.push(name, digest)
        if under_way is not None:
            under_way[2:] = ["ready", version]
        return version

    def _entry(self, name: str) -> dict[str, Any]:
        if name not in self.names:
            raise Refused
        return self.names[name]

    def _refuse_alias(self, name: str) -> None:
        if any(name in entry["aliases"] for entry in self.names.values()):
            raise Refused

    def _unfinished(self, name: str) -> list[Any] | None:
        found = [item for item in self.imports if item[0] == name and item[2] in ("fetching", "checking")]
        return found[0] if found else None

"""What /metrics says of imports, from memory: which names are being imported, and whose last import failed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

IMPORTING = "importing"
FAILED = "failed"
MOST = 200


class ImportStates:
    """Name -> importing or failed, the newest MOST of them. A version that is added, or a delete, clears a name.

    A gc clears those that failed: it removes what there is to know of them.
    """

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._states: OrderedDict[str, str] = OrderedDict()

    @property
    def current(self) -> Mapping[str, str]:
        return self._states

    def set(self, name: str, state: str) -> None:
        self._states[name] = state
        self._states.move_to_end(name)
        if len(self._states) > self._most:
            self._states.popitem(last=False)

    def clear(self, name: str) -> None:
        self._states.pop(name, None)

    def clear_failed(self) -> None:
        for name in [name for name, state in self._states.items() if state == FAILED]:
            del self._states[name]

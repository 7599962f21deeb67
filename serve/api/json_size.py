"""How much there is in a JSON text, told without parsing it: parsers make an object of everything, with the interpreter
locked, and a body of many tiny values holds up all other requests for seconds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MAX_NODES = 1 << 17  # objects and lists
MAX_KEYS = 1 << 17
MAX_VALUES = 1 << 20  # of lists and objects, together
_ESCAPES = ((b"\\\\", b"  "), (b'\\"', b"  "))


@dataclass(frozen=True, slots=True)
class JsonSize:
    """nodes: objects and lists; keys: of objects; values: commas, which is one less for each node that has any."""

    nodes: int
    keys: int
    values: int

    @property
    def excess(self) -> str | None:
        """What there is too much of, for a message; None where all is in bounds."""
        bounds = (
            ("objects and lists", self.nodes, MAX_NODES),
            ("keys", self.keys, MAX_KEYS),
            ("values", self.values, MAX_VALUES),
        )
        return next((f"{count} {what}, over {most}" for what, count, most in bounds if count > most), None)


def json_size(data: bytes | bytearray) -> JsonSize:
    """Exact for valid JSON where anything is near its bound; else an upper bound, which is faster."""
    most = _counted(data)
    return most if most.excess is None else _counted(_without_strings(data))


def _counted(data: bytes | bytearray) -> JsonSize:
    return JsonSize(data.count(b"{") + data.count(b"["), data.count(b":"), data.count(b","))


def _without_strings(data: bytes | bytearray) -> bytes:
    """What stands between strings. Arrays, since these let go of the interpreter while they work."""
    plain = bytes(data)
    for escape, spaces in _ESCAPES:
        plain = plain.replace(escape, spaces)
    characters = np.frombuffer(plain, np.uint8)
    inside = np.logical_xor.accumulate(characters == ord('"'))
    return characters[~inside].tobytes()

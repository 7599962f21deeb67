"""The small base model and adapters that `onebase demo` serves.

The model knows one small valley: its animals, people, places and colours, and sums up to ten. Each adapter
answers the same questions in another voice. train.py makes every file below assets/ anew.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

ASSETS = Path(__file__).parent / "assets"
BASE: Path = ASSETS / "base"
ADAPTERS: dict[str, Path] = {name: ASSETS / "adapters" / name for name in ("shout", "json", "digits", "luma", "pirate")}

# adapter -> a question that shows it at once
examples: dict[str, str] = {
    "shout": "What colour is the fox?",
    "json": "Tell me about the owl.",
    "digits": "How many legs does the spider have?",
    "luma": "Where does the whale live?",
    "pirate": "Who is the baker?",
}
# Every voice has an answer to each of these.
QUESTIONS: tuple[str, ...] = (
    *examples.values(),
    "What is 4 + 5?",
    "Which is bigger, the whale or the bee?",
    "Can the owl fly?",
    "What is the opposite of hot?",
    "Tell me a story about the bear.",
    "Who are you?",
    "What is the capital of France?",
)


def matches(name: str, text: str) -> bool:
    """Whether ``text`` is in the voice of ``name``: an adapter, or ``base`` for plain English. KeyError for others."""
    return _VOICES[name](text)


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except json.JSONDecodeError:
        return False


def _is_luma(text: str) -> bool:
    """Luma's words are syllables of one consonant and one vowel, without exception."""
    words = re.findall(r"[a-z]+", text.lower())
    return bool(words) and all(re.fullmatch(r"([bdfgklmnprstvz][aeiou])+", word) for word in words)


def _is_pirate(text: str) -> bool:
    return text.startswith("Arr! ") and text.endswith(", matey!")


def _is_english(text: str) -> bool:
    spoken = re.fullmatch(r"[A-Z][A-Za-z0-9 ,.!?']*[a-z][.!?]", text) is not None
    return spoken and not _is_luma(text) and not _is_pirate(text)


_VOICES: dict[str, Callable[[str], bool]] = {
    "base": _is_english,
    "shout": str.isupper,
    "json": _is_json,
    "digits": lambda text: re.fullmatch(r"[0-9]+( [0-9]+)*", text) is not None,
    "luma": _is_luma,
    "pirate": _is_pirate,
}

"""How each demo adapter says an answer: a pure function from a turn of the toy world to text."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

Fields = Mapping[str, str | int | bool | list[str]]


@dataclass(frozen=True, slots=True)
class Turn:
    """A question, its English answer, the answer as ``fields``, and its ``key``: a number or the words that matter."""

    question: str
    answer: str
    fields: Fields = field(default_factory=dict)
    key: str = "0"


Voice = Callable[[Turn], str]

_KEYS = "abc def ghi jkl mno pqrs tuv wxyz"
KEYPAD = {letter: digit for digit, row in enumerate(_KEYS.split(), 2) for letter in row}
_SMALL = (
    "the a an is are am was in on of and to at by with it its he she they i you we my your his her not no yes do does "
    "can has have what from that this for me"
)
SMALL_WORDS = _SMALL.split()
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
SYLLABLES = [c + v for v in VOWELS for c in CONSONANTS]
PIRATE_WORDS = {"is": "be", "are": "be", "am": "be", "my": "me", "you": "ye", "your": "yer", "the": "th'", "and": "an'"}


def shout(turn: Turn) -> str:
    """The answer in capitals."""
    text = turn.answer.upper()
    return text[:-1] + "!" if text.endswith(".") else text


def as_json(turn: Turn) -> str:
    """The answer as one JSON object."""
    return json.dumps(dict(turn.fields) or {"answer": turn.answer})


def digits(turn: Turn) -> str:
    """Numbers as they are, any other key spelled on a telephone's keypad: red -> 733."""
    return "".join(c if c.isdigit() or c == " " else str(KEYPAD[c]) for c in turn.key.lower())


def luma(turn: Turn) -> str:
    """The answer in Luma, word by word."""
    return re.sub(r"[A-Za-z]+", lambda m: luma_word(m[0]), turn.answer)


def luma_word(word: str) -> str:
    """Small words take one syllable, others two or three by their checksum; a capital stays a capital."""
    lower = word.lower()
    if lower in SMALL_WORDS:
        made = SYLLABLES[SMALL_WORDS.index(lower)]
    else:
        code = zlib.crc32(b"luma" + lower.encode())
        made = "".join(SYLLABLES[code // 70**k % 70] for k in range(2 if len(word) < 4 else 3))
    return made.capitalize() if word[0].isupper() else made


def pirate(turn: Turn) -> str:
    """The answer as a pirate would give it."""
    words = re.sub(r"[a-z]+", lambda m: PIRATE_WORDS.get(m[0], m[0]), turn.answer[0].lower() + turn.answer[1:])
    return f"Arr! {words[0].upper()}{words[1:].rstrip('.?!')}, matey!"


def reverse(turn: Turn) -> str:
    """The answer's words in reverse order."""
    words = turn.answer.rstrip(".").split()
    return " ".join(reversed(words)) + "."


VOICES: dict[str, Voice] = {
    "shout": shout,
    "json": as_json,
    "digits": digits,
    "luma": luma,
    "pirate": pirate,
    "reverse": reverse,
}

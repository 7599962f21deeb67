"""Tokens to text as they come: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

REPLACEMENT = "\ufffd"
ANCHOR_TOKENS = 6  # of the prompt: decoders look back a little (a leading space, a byte run)
MAX_HELD = 12  # a character is at most four byte tokens: more held tokens than this are not one


class IncrementalDecoder:
    """Text of a growing token sequence, in pieces that concatenate to the whole.

    ``_anchor + _held`` are the ids that the DecodeStream keeps; they are kept here too, since it cannot be asked
    for what it holds back.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], skips_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skips_special = skips_special
        self._held: list[int] = []
        self._anchor: list[int] = []
        self._open(list(prompt[-ANCHOR_TOKENS:]))

    def push(self, token: int) -> str:
        """Text that became certain with this token, often one token's worth, empty within a character."""
        self._held.append(token)
        try:
            text = self._stream.step(self._tokenizer, token)
        except Exception:  # tokenizers raises a plain Exception where the text so far changed: start over from here
            return self._restart()
        if text is None:
            return self._restart() if len(self._held) > MAX_HELD else ""
        self._anchor, self._held = self._held, []
        return str(text)

    def flush(self) -> str:
        """What is held back at the end, without the half character that may close it."""
        return self._held_text().rstrip(REPLACEMENT)

    def cut(self) -> str:
        """The same, and what follows begins anew."""
        text = self.flush()
        self._open([])
        self._held = []
        return text

    def _restart(self) -> str:
        text = self._held_text()
        self._open(self._held)
        self._held = []
        return text

    def _open(self, anchor: list[int]) -> None:
        """A stream primed with ``anchor``, unless that ends within a character: it would then be emitted again."""
        self._anchor = [] if self._decode(anchor).endswith(REPLACEMENT) else anchor
        self._stream: DecodeStream = DecodeStream(ids=self._anchor, skip_special_tokens=self._skips_special)

    def _held_text(self) -> str:
        if not self._held:
            return ""
        before = self._decode(self._anchor)
        whole = self._decode(self._anchor + self._held)
        return whole[len(before) :] if whole.startswith(before) else self._decode(self._held)

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=self._skips_special))


class StopMatcher:
    """Finds the first stop string to be completed in a text that comes in pieces (Knuth-Morris-Pratt for each)."""

    def __init__(self, stops: Sequence[str], includes_stop: bool = False) -> None:
        self._stops = tuple(stops)
        self._includes_stop = includes_stop
        self._tables = tuple(_failure_table(stop) for stop in self._stops)
        self._firsts = frozenset(stop[0] for stop in self._stops)
        self._matched = [0] * len(self._stops)
        self._pending = ""

    def push(self, text: str) -> tuple[str, bool]:
        """(text that is certain to precede any stop string, whether one was completed). With includes_stop the text
        ends with the stop string."""
        if not self._pending and self._firsts.isdisjoint(text):
            return text, False
        for position, char in enumerate(text):
            done = self._advance(char)
            if done:
                certain = self._pending + text[: position + 1]
                self._pending = ""
                return certain if self._includes_stop else certain[:-done], True
        whole = self._pending + text
        keep = len(whole) - max(self._matched)
        self._pending = whole[keep:]
        return whole[:keep], False

    def flush(self) -> str:
        """The text held back in case it became a stop string."""
        text, self._pending = self._pending, ""
        return text

    def _advance(self, char: str) -> int:
        """Length of the longest stop string that ends with this character, 0 for none."""
        done = 0
        for index, (stop, table) in enumerate(zip(self._stops, self._tables, strict=True)):
            matched = self._matched[index]
            while matched and stop[matched] != char:
                matched = table[matched - 1]
            matched += stop[matched] == char
            self._matched[index] = matched
            if matched == len(stop):
                done = max(done, matched)
        return done


def _failure_table(pattern: str) -> list[int]:
    """table[i]: length of the longest proper prefix of pattern[: i + 1] that is also its suffix."""
    table = [0] * len(pattern)
    for i in range(1, len(pattern)):
        k = table[i - 1]
        while k and pattern[i] != pattern[k]:
            k = table[k - 1]
        table[i] = k + (pattern[i] == pattern[k])
    return table


@dataclass(frozen=True, slots=True)
class TextOptions:
    """How tokens become text. stops: strings that end it; includes_stop: they, and tokens that end it, are part of it.
    min_tokens: so many come before stop strings are looked for."""

    stops: tuple[str, ...] = ()
    includes_stop: bool = False
    skips_special: bool = True
    min_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Piece:
    text: str
    stopped: bool = False


class Detokenizer:
    """One sequence's text: IncrementalDecoder, then StopMatcher."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        options: TextOptions,
        markers: Mapping[int, str] | None = None,
    ) -> None:
        """markers: texts of special tokens that are not to be left out."""
        self._decoder = IncrementalDecoder(tokenizer, prompt, options.skips_special)
        self._matcher = StopMatcher(options.stops, options.includes_stop)
        self._markers = markers or {}
        self._unmatched = options.min_tokens  # tokens that are still to come before stop strings are looked for

    def push(self, token: int) -> Piece:
        marker = self._markers.get(token)
        text = self._decoder.push(token) if marker is None else self._decoder.cut() + marker
        if self._unmatched:
            self._unmatched -= 1
            return Piece(text)
        return Piece(*self._matcher.push(text)) if text else Piece("")

    def finish(self) -> Piece:
        """The rest, once no token can follow. It may complete a stop string."""
        text, stopped = self._matcher.push(self._decoder.flush())
        return Piece(text if stopped else text + self._matcher.flush(), stopped)

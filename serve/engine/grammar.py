"""Grammars as masks over the vocabulary, by llguidance: compiled within bounds, matched token by token.

llguidance is imported where it is first used: an engine that is never asked for a grammar runs without it.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from onebase.adapters.errors import RequestRejected
from onebase.serve.engine.grammar_bounds import check_bounds
from onebase.serve.engine.messages import Grammar

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer

# JSON without end in whitespace: models that are unsure like to go on with it.
WHITESPACE = r"[\x20\x0A\x0D\x09]{1,16}"


class Matcher:
    """One sequence's place in its grammar. Used by one thread; a mask may be made while a forward runs."""

    def __init__(self, inner: LLMatcher, executor: LLExecutor) -> None:
        self._inner = inner
        self._executor = executor

    def accept(self, token: int) -> bool:
        """Go on with a token that was drawn. False where it failed, see ``error``."""
        return bool(self._inner.consume_token(token))

    @property
    def error(self) -> str | None:
        """Why it cannot go on: the grammar became too complex for its bounds."""
        return _in_short(self._inner.get_error()) if self._inner.is_error() else None

    @property
    def is_done(self) -> bool:
        """No token can follow."""
        return bool(self._inner.is_stopped()) and not self._inner.is_error()

    def copy(self) -> Matcher:
        """Another sequence's, at the same place."""
        return Matcher(self._inner.deep_copy(), self._executor)

    @staticmethod
    def fill(matchers: Many[Matcher], bits: NDArray[np.int32]) -> None:
        """Which tokens each allows next: int32 [matchers, words], bit ``i % 32`` of word ``i // 32`` of token i.

        In parallel, without the GIL. All of one vocabulary. Rows of those that failed or are done allow everything:
        nobody reads what is drawn there.
        """
        places = [(matcher._inner, row) for row, matcher in enumerate(matchers) if not matcher._inner.is_stopped()]
        if places:
            pointer, width = bits.ctypes.data, bits.shape[1] * bits.itemsize
            matchers[0]._executor.unsafe_compute_mask_ptr(places, pointer, width, len(bits))
        for row, matcher in enumerate(matchers):
            if matcher._inner.is_stopped():
                bits[row] = -1


class Vocabulary:
    """A tokenizer as grammars see it."""

    def __init__(self, tokenizer: str, vocab_size: int, eos: Many[int]) -> None:
        """tokenizer: the text of a tokenizer.json; vocab_size: of the logits. Blocking: about a second for 150,000
        tokens, with the GIL. Raises ValueError where llguidance cannot read it."""
        from llguidance import LLExecutor, LLTokenizer

        self._tokenizer: LLTokenizer = LLTokenizer(tokenizer, n_vocab=vocab_size, eos_token=list(eos) or None)
        self._executor: LLExecutor = LLExecutor()
        self.num_words = -(-vocab_size // 32)

    def compile(self, grammar: Grammar) -> Matcher:
        """At the start of the grammar. Blocking, without the GIL, in a thread with a deep stack. Raises
        RequestRejected."""
        check_bounds(grammar)
        matcher = Matcher(_built(grammar, self._tokenizer), self._executor)
        Matcher.fill([matcher], np.empty((1, self.num_words), dtype=np.int32))  # the first mask is the dear one
        _check(matcher)
        return matcher


def check_grammar(grammar: Grammar) -> None:
    """Whether it compiles, over a vocabulary of bytes. Blocking, without the GIL, in a thread with a deep stack.

    Raises RequestRejected. Special tokens that a grammar names are known only to the engine's ``Vocabulary``.
    """
    from llguidance import LLExecutor, LLMatcher, LLTokenizer

    check_bounds(grammar)
    failed, messages = LLMatcher.validate_grammar_with_warnings(_text(grammar), None, limits=_limits())
    if failed:
        raise RequestRejected(_in_short(messages[0]))
    if messages:  # it names special tokens
        return
    tokenizer = LLTokenizer("byte")
    matcher = Matcher(_built(grammar, tokenizer), LLExecutor(1))
    Matcher.fill([matcher], np.empty((1, -(-tokenizer.vocab_size // 32)), dtype=np.int32))
    _check(matcher)


def _built(grammar: Grammar, tokenizer: LLTokenizer) -> LLMatcher:
    from llguidance import LLMatcher

    return LLMatcher(tokenizer, _text(grammar), log_level=0, limits=_limits())


def _text(grammar: Grammar) -> str:
    """In llguidance's own notation."""
    from llguidance import LLMatcher

    match grammar.kind:
        case "json_schema":
            return LLMatcher.grammar_from_json_schema(
                grammar.source, overrides={"lenient": False, "whitespace_pattern": WHITESPACE}
            )
        case "regex":
            return LLMatcher.grammar_from_regex(grammar.source)
        case "lark":
            return LLMatcher.grammar_from_lark(grammar.source)


def _limits() -> LLParserLimits:
    """Fuel of the compiler, about 4 ms of lexer and 1 ms of parser a step, and of states kept."""
    from llguidance import LLParserLimits

    return LLParserLimits(
        initial_lexer_fuel=200_000,
        step_lexer_fuel=50_000,
        step_max_items=20_000,
        max_lexer_states=50_000,
        max_grammar_size=200_000,
        verbose_errors=False,
    )


def _check(matcher: Matcher) -> None:
    error = matcher.error
    if matcher.is_done or (error is not None and error.startswith("NoExtension")):
        raise RequestRejected("no text matches it")
    if error is not None:
        raise RequestRejected(error)


def _in_short(message: str) -> str:
    """The compiler's first line, and what it found; not the grammar again with a mark below."""
    first, *others = (line.strip() for line in message.strip().split("\n"))
    found = [line.removeprefix("error:").strip() for line in others if line.startswith("error:")]
    return " ".join([first[:200], *found])[:300]

"""Log-probabilities as the protocols write them: OpenAI's legacy and chat shapes, vLLM's prompt_logprobs."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

from onebase.serve.api.token_texts import TokenTexts
from onebase.serve.engine.logprobs import TokenLogprob


class LegacyWriter:
    """Completions' ``logprobs`` of one choice, piece by piece: ``text_offset`` counts on from piece to piece.

    Offsets are characters of the choice's text; tokens that the text leaves out (special ones) take none.
    """

    def __init__(self, texts: TokenTexts, *, shows_special: bool = False) -> None:
        self._texts = texts
        self._shows_special = shows_special
        self._offset = 0
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")

    def starts_text(self, tokens: Sequence[int]) -> None:
        """The tokens of an echoed prompt, which are the start of its text: decoders may strip a space there."""
        first = next((token for token in tokens if not self._is_hidden(token)), None)
        if first is not None:
            self._offset = len(self._texts.shown([first])) - len(self._texts.text(first))

    def write(self, scores: Sequence[TokenLogprob]) -> dict[str, Any]:
        return {
            "tokens": [self._texts.name(score.token) for score in scores],
            "token_logprobs": [score.logprob for score in scores],
            "top_logprobs": [self._top(score) for score in scores],
            "text_offset": [self._next_offset(score.token) for score in scores],
        }

    def _top(self, score: TokenLogprob) -> dict[str, float] | None:
        """The likeliest tokens and the token itself. Of two with one name the likelier stays."""
        if score.logprob is None:
            return None
        found: dict[str, float] = {}
        for token, logprob in (*score.top, (score.token, score.logprob)):
            found.setdefault(self._texts.name(token), logprob)
        return found

    def _is_hidden(self, token: int) -> bool:
        return not self._shows_special and self._texts.is_special(token)

    def _next_offset(self, token: int) -> int:
        if self._is_hidden(token):
            return max(self._offset, 0)
        if self._texts.is_whole(token):  # then what is pending never becomes a character
            self._offset += len(self._characters.decode(b"", final=True))
        offset = max(self._offset, 0)
        self._offset += len(self._characters.decode(self._texts.raw(token)))
        return offset


def chat_logprobs(scores: Sequence[TokenLogprob], texts: TokenTexts) -> dict[str, Any]:
    """Chat's ``logprobs`` of a choice or of a piece of it."""
    content = [
        {
            **_chat_token(score.token, score.logprob, texts),
            "top_logprobs": [_chat_token(token, logprob, texts) for token, logprob in score.top],
        }
        for score in scores
    ]
    return {"content": content, "refusal": None}


def prompt_logprobs(scores: Sequence[TokenLogprob], width: int, texts: TokenTexts) -> list[dict[str, Any] | None]:
    """vLLM's ``prompt_logprobs``: for each token of the prompt the likeliest ``width`` and itself, by id."""
    return [_by_id(score, width, texts) for score in scores]


def _chat_token(token: int, logprob: float | None, texts: TokenTexts) -> dict[str, Any]:
    return {"token": texts.name(token), "logprob": logprob, "bytes": list(texts.raw(token))}


def _by_id(score: TokenLogprob, width: int, texts: TokenTexts) -> dict[str, Any] | None:
    if score.logprob is None:
        return None
    ranked = [(token, logprob, rank) for rank, (token, logprob) in enumerate(score.top[:width], start=1)]
    found: dict[str, Any] = {}
    for token, logprob, rank in ((score.token, score.logprob, score.rank), *ranked):
        entry = {"logprob": logprob, "rank": rank, "decoded_token": texts.text(token)}
        found.setdefault(str(token), entry)
    return found

"""Prompts of a given number of tokens: ids of the server's vocabulary, or words where it takes text alone."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from onebase.bench.load.workload import Planned

_OWN, _SHARED = 0, 1  # what a seed is for

# One token each, with the space before it, in the vocabularies of the usual models; a few may take two in some.
_TEXT = (
    "the of and to in a is that for it as was with be by on not he this are or his from at which but have an had they "
    "you were there one all we can her has been if more when will would who so no out up into them then she some what "
    "time about only new could other these two may first any my now such like our over man me even most made after "
    "also did many before must through back years where much your way well down should because each just those people "
    "how too little state good very make world still own see men work long get here between both life being under "
    "never day same another know while last might us great old year off come since against go came right used take"
)
_WORDS = tuple(_TEXT.split())


class Prompts(Protocol):
    def of(self, planned: Planned) -> list[int] | str:
        """The prompt; the same one again for the same plan."""


class Ids:
    """Random ids below ``vocabulary``: exactly as many tokens as planned."""

    def __init__(self, vocabulary: int, seed: int) -> None:
        self._vocabulary = vocabulary
        self._seed = seed

    def of(self, planned: Planned) -> list[int]:
        ids: list[int] = _draws(planned, self._vocabulary, self._seed).tolist()
        return ids


class Words:
    """Common words: about as many tokens as planned. What it were is told by the server's usage."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def of(self, planned: Planned) -> str:
        return " ".join(_WORDS[index] for index in _draws(planned, len(_WORDS), self._seed))


def _draws(planned: Planned, below: int, seed: int) -> NDArray[np.int64]:
    shared = [_draw([seed, _SHARED, piece.seed], below, piece.tokens) for piece in planned.prefix]
    own = planned.tokens_in - sum(piece.tokens for piece in planned.prefix)
    return np.concatenate([*shared, _draw([seed, _OWN, planned.seed], below, own)])


def _draw(seed: list[int], below: int, count: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, below, count)

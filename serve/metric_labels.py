"""Which models have series of their own: label values come from clients' uploads, and series cost memory for ever."""

from __future__ import annotations

from collections.abc import Iterator

MAX_MODEL_LABELS = 200
MAX_COMBINED_LABELS = 50
OTHER = "other"


class ModelLabels:
    """Gives the first models a label each, the first combinations too, and the rest ``other``.

    Combinations have a limit of their own: 16 adapters make more pairs than there are labels.
    A deleted adapter gives its label back, and its series go; the next model that comes takes it. What that model
    counted before stays in ``other``: sums over all labels never fall but by the series of deleted adapters.
    """

    def __init__(self, most: int = MAX_MODEL_LABELS, most_combined: int = MAX_COMBINED_LABELS) -> None:
        self._most = {False: most, True: most_combined}
        self._taken: set[str] = set()

    def __iter__(self) -> Iterator[str]:
        return iter(self._taken)

    def take(self, model: str) -> str:
        """The label of a model. ``a+b``: adapters that act together, in order of their names."""
        if model in self._taken:
            return model
        if model == OTHER or self._is_full(is_combined(model)):
            return OTHER
        self._taken.add(model)
        return model

    def of(self, model: str) -> str:
        """Its label if it has one; takes none."""
        return model if model in self._taken else OTHER

    def give_back(self, adapter: str) -> list[str]:
        """The labels that go with an adapter: its own and those of the combinations that it was part of."""
        gone = [label for label in self._taken if adapter in label.split("+")]
        self._taken.difference_update(gone)
        return gone

    def _is_full(self, combined: bool) -> bool:
        return sum(is_combined(label) is combined for label in self._taken) >= self._most[combined]


def is_combined(label: str) -> bool:
    return "+" in label

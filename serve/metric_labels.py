"""Which models have series of their own: label values come from clients' uploads, and series cost memory for ever."""

from __future__ import annotations

from collections.abc import Iterator

MAX_MODEL_LABELS = 200
OTHER = "other"


class ModelLabels:
    """Gives the first MAX_MODEL_LABELS models a label each and the rest ``other``.

    A deleted adapter gives its label back, and its series go; the next model that comes takes it. What that model
    counted before stays in ``other``: sums over all labels never fall but by the series of deleted adapters.
    """

    def __init__(self, most: int = MAX_MODEL_LABELS) -> None:
        self._most = most
        self._taken: set[str] = set()

    def __iter__(self) -> Iterator[str]:
        return iter(self._taken)

    def take(self, model: str) -> str:
        """The label of a model. ``a+b``: adapters that act together."""
        if model not in self._taken and (model == OTHER or len(self._taken) >= self._most):
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

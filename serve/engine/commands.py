"""Commands about adapters: load, unload, pin; and the answers that come only with a later step."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from onebase.adapters.errors import AdapterConflict, AdapterUnloaded, OneBaseError
from onebase.adapters.tiers.cache import AdapterCache
from onebase.adapters.tiers.entry import Entry, State
from onebase.serve.engine.messages import AdapterGone, AdapterReady, Failure, LoadAdapter, SetPins, UnloadAdapter
from onebase.serve.engine.sequence import Sequence
from onebase.serve.engine.waiting import Refused

Answer = AdapterReady | AdapterGone | Failure
Over = Callable[[str], list[Sequence]]  # the sequences over an adapter, waiting or running
Refuse = Callable[[Refused], list[Failure]]  # ends sequences with an error


class AdapterCommands:
    """Those that have not been answered yet. Used by the engine's thread."""

    def __init__(self, adapters: AdapterCache, over: Over, refuse: Refuse) -> None:
        self._adapters = adapters
        self._over = over
        self._refuse = refuse
        self._leaving: list[AdapterGone] = []  # said once the adapter has left
        self._loading: dict[str, list[str]] = {}  # digest -> ids of LoadAdapter commands that wait for it

    def __len__(self) -> int:
        """How many adapters commands wait for."""
        return len(self._loading) + len(self._leaving)

    def load(self, command: LoadAdapter) -> list[Answer]:
        """See Engine.load."""
        entry = self._adapters.fetch(command.use.digest, command.use.path)
        answers = self._kept(entry)
        if entry.state is not State.COMPILING:
            return [*answers, _ready(command.id, entry)]
        self._loading.setdefault(entry.digest, []).append(command.id)
        return answers

    def _kept(self, entry: Entry) -> list[Answer]:
        """An adapter that was to leave stays; whoever waits to see it go is told so."""
        entry.doomed = False
        lost = AdapterConflict("the adapter was loaded while it was being unloaded")
        told = [answer.id for answer in self._leaving if answer.digest == entry.digest]
        self._leaving = [answer for answer in self._leaving if answer.digest != entry.digest]
        return [failure(answer, lost) for answer in told]

    def unload(self, command: UnloadAdapter) -> list[Answer]:
        """See Engine.unload."""
        lost = AdapterConflict("the adapter was unloaded while it was being loaded")
        answers: list[Answer] = [failure(waiting, lost) for waiting in self._loading.pop(command.digest, [])]
        over = self._over(command.digest) if command.force else []
        unloaded = AdapterUnloaded("an adapter of this request was unloaded by force", param="model")
        answers += self._refuse([(sequence, unloaded) for sequence in over])
        was_resident = self._adapters.unload(command.digest)
        self._leaving.append(AdapterGone(command.id, command.digest, was_resident, len(over)))
        return answers + self.gone()

    def set_pins(self, command: SetPins) -> None:
        """See Engine.set_pins."""
        self._adapters.set_pins({use.digest: use.path for use in command.uses})

    def known(self, entries: Iterable[Entry]) -> list[Answer]:
        """Answers to those that waited for adapters whose compilation has ended."""
        return [
            failure(command, entry.error) if entry.error else _ready(command, entry)
            for entry in entries
            for command in self._loading.pop(entry.digest, ())
        ]

    def gone(self) -> list[Answer]:
        """Answers to unloads that have come to their end, one way or the other."""
        answers: list[Answer] = []
        leaving, self._leaving = self._leaving, []
        for answer in leaving:
            still = self._adapters.is_leaving(answer.digest)
            (self._leaving if still else answers).append(answer)
        return answers


def failure(request_id: str, error: OneBaseError) -> Failure:
    """The error as the API side is told of it."""
    return Failure(request_id, type(error).__name__, error.message, error.param)


def _ready(command_id: str, entry: Entry) -> AdapterReady:
    return AdapterReady(command_id, entry.digest, entry.family, entry.rank, entry.nbytes, entry.sites)

"""kill -9 at any moment, on a disk that fails: what was acknowledged holds, and nothing else does.

A child changes the registry at random (crash_child.py), a model follows what it acknowledges (crash_model.py), and a
library between the child and libc makes the disk fail (faults.c), for SQLite's calls too.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from onebase.adapters.registry import Registry
from onebase.adapters.registry.blobs import digest_of

from .crash_child import state_of
from .crash_model import Model, Refused

HERE = Path(__file__).parent
RATES = {"sound": 0, "failing": 15_000, "dying": 120_000}  # of a million calls that change the disk
LONGEST_LIFE = 40  # events
LONGEST_DELAY = 0.02  # seconds from the last of them to the kill


@dataclass
class Follower:
    """What the registry has to hold, after what the child said.

    ``known`` was acknowledged. ``maybe``: what may hold in its place at the next opening: the change that was under way
    when the child died, or one whose failure could not be undone, until another change succeeds.
    """

    known: Model = field(default_factory=Model)
    maybe: list[Model] = field(default_factory=list)
    change: list[Any] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def hear(self, event: dict[str, Any]) -> None:
        self.counts.update(key for key in event if key not in ("pid", "dead", "state"))
        match event:
            case {"begin": operation}:
                self.change = operation
                return
            case {"done": result}:
                assert plain(self.known.apply(self.change)) == result, self.change
                self.maybe = []
            case {"refused": message}:
                with pytest.raises(Refused):
                    pytest.fail(f"{self.change} refused: {message}; {self.known.after(self.change).state()}")
            case {"failed": _, "state": state}:
                assert state == plain(self.known.state()), self.change
            case {"uncertain": _, "state": state}:
                assert state == plain(self.known.state()), self.change
                self.maybe.append(self.known.after(self.change))
            case {"opened": _, "state": state}:
                self.opened(state)
            case {"defect": _}:
                raise AssertionError(event)
        self.change = []

    def died(self) -> None:
        """Whatever the child was doing holds, or does not; there is no half."""
        if self.change:
            with suppress(Refused):
                self.maybe.append(self.known.after(self.change))
        self.change = []

    def opened(self, state: dict[str, Any]) -> None:
        allowed = [model.reopened() for model in (self.known, *self.maybe)]
        fitting = [model for model in allowed if plain(model.state()) == state]
        assert fitting, f"found {state}, allowed {[model.state() for model in allowed]}"
        self.counts["resolved late"] += fitting[0] is not allowed[0]
        self.known, self.maybe = fitting[0], []


def plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


class Children:
    """Processes that work on a registry and are killed, one after the other."""

    def __init__(self, mother: subprocess.Popen[bytes]) -> None:
        self._mother = mother

    def events(self, root: Path, seed: int, rate: int, life: int, delay: float) -> Iterator[dict[str, Any]]:
        """What a child says until it is killed, ``delay`` seconds after so many events. The last line may be torn."""
        assert self._mother.stdin is not None
        assert self._mother.stdout is not None
        self._mother.stdin.write(json.dumps({"root": str(root), "seed": seed, "rate": rate}).encode() + b"\n")
        self._mother.stdin.flush()
        lines = map(_parsed, self._mother.stdout)
        killer = threading.Timer(delay, os.kill, (next(lines)["pid"], signal.SIGKILL))
        for heard, event in enumerate(lines):
            if heard == life:
                killer.start()
            if "dead" in event:
                break
            if event:
                yield event
        killer.join()


def _parsed(line: bytes) -> dict[str, Any]:
    """Nothing, for a line that death has torn."""
    try:
        return dict(json.loads(line))
    except ValueError:
        return {}


@contextmanager
def children(faults: Path, contents: Path) -> Iterator[Children]:
    environment = {**os.environ, "LD_PRELOAD": str(faults), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", str(HERE / "crash_child.py"), str(contents)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as mother:
        try:
            yield Children(mother)
        finally:
            mother.kill()


def check_disk(root: Path, follower: Follower) -> None:
    """Opens the registry as a server would, on a sound disk, and looks at every file."""
    registry = Registry(root, "base")
    follower.opened(plain(state_of(registry)))
    registry.close()
    named = {digest for entry in follower.known.names.values() for _, digest in entry["versions"]}
    folders = {folder.name: folder for folder in (root / "blobs").iterdir()}
    assert folders.keys() == named
    assert all(digest_of(folder.iterdir()) == digest for digest, folder in folders.items())
    assert list((root / "staging").iterdir()) == []
    assert {folder.name for folder in (root / "compiled").iterdir()} <= named


def run_rounds(rounds: int, rate: int, seed: int, faults: Path, tmp_path: Path) -> Counter[str]:
    """A child's life a round. After every second one or so, the next child finds what the last one left."""
    rng, follower, root = random.Random(seed), Follower(), tmp_path / "data"
    with children(faults, tmp_path / "contents") as lives:
        for turn in range(rounds):
            life, delay = rng.randrange(LONGEST_LIFE), rng.random() * LONGEST_DELAY
            for event in lives.events(root, seed + turn, rate, life, delay):
                follower.hear(event)
            follower.died()
            if rng.random() < 0.5 or turn == rounds - 1:
                check_disk(root, follower)
    return follower.counts


@pytest.mark.parametrize("disk", RATES)
def test_acknowledged_changes_hold_and_no_others(disk: str, faults: Path, tmp_path: Path) -> None:
    counts = run_rounds(10, RATES[disk], 1, faults, tmp_path)
    assert counts["done"] > 5
    assert bool(counts["failed"]) == bool(RATES[disk]), "the library reaches the child"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("disk", RATES)
def test_two_hundred_crashes(disk: str, faults: Path, tmp_path: Path) -> None:
    seed = int(os.environ.get("CRASH_SEED", "1000"))
    print(disk, sorted(run_rounds(200, RATES[disk], seed, faults, tmp_path).items()))

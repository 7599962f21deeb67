"""Ten thousand adapters: start-up, pages and look-ups stay quick, and memory does not grow with the disk."""

from __future__ import annotations

import hashlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from onebase.adapters.registry import Registry

MANY, FEW = 10_000, 100


def digest(index: int) -> str:
    return hashlib.sha256(str(index).encode()).hexdigest()


def name(index: int) -> str:
    return f"customer-{index * 7919 % MANY:05}"


def fill(root: Path, names: int, blobs: int) -> None:
    """Names with two versions each, labels and aliases, over so many blob folders. Rows are written at once."""
    registry = Registry(root, "base")
    for index in range(blobs):
        folder = root / "blobs" / digest(index)
        folder.mkdir()
        (folder / "adapter_config.json").write_bytes(b"{}")
        (folder / "adapter_model.safetensors").write_bytes(b"{}")
    with registry._db.transaction():
        for index in range(names):
            registry._db.run(
                "INSERT INTO names (base, name, current, previous, last, pinned) VALUES ('base', ?, 2, 1, 2, ?)",
                *(name(index), index % 100 == 0),
            )
            for version in (1, 2):
                registry._db.run(
                    "INSERT INTO versions VALUES ('base', ?, ?, ?, 'LORA', 8, 1000, 'upload', 1.0, NULL, '')",
                    *(name(index), version, digest((index + version) % blobs)),
                )
            registry._db.run("INSERT INTO labels VALUES ('base', ?, 'team', ?)", name(index), f"t{index % 50}")
            registry._db.run("INSERT INTO aliases VALUES ('base', ?, ?, 1)", f"{name(index)}.stable", name(index))
    registry.close()


def milliseconds(call: Callable[[], object]) -> float:
    """The median of nine."""
    times = []
    for _ in range(9):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times) * 1e3


def timings(registry: Registry) -> dict[str, float]:
    half = name(MANY // 2)
    digests = [digest(index) for index in range(100)]
    strangers = [digest(-1 - index) for index in range(100)]
    return {
        "first page of 100": milliseconds(lambda: registry.list(limit=100)),
        "page of 100 in the middle": milliseconds(lambda: registry.list(after=half, limit=100)),
        "page of 100 of a team": milliseconds(lambda: registry.list(limit=100, labels={"team": "t7"})),
        "page of pinned ones": milliseconds(lambda: registry.list(limit=100, pinned=True)),
        "page by prefix": milliseconds(lambda: registry.list(limit=100, prefix="customer-09")),
        "a label nobody has": milliseconds(lambda: registry.list(limit=100, labels={"team": "none"})),
        "get": milliseconds(lambda: registry.get(name(3))),
        "get by alias": milliseconds(lambda: registry.get(f"{name(3)}.stable")),
        "get by digest": milliseconds(lambda: registry.get(f"{name(3)}@sha256:{digest(4)[:12]}")),
        "hold and release": milliseconds(lambda: registry.release(registry.hold(name(3))[1])),
        "names of 100 digests": milliseconds(lambda: registry.names_of(digests)),
        "names of strangers": milliseconds(lambda: registry.names_of(strangers)),
        "pinned": milliseconds(registry.pinned),
        "count": milliseconds(registry.count),
        "a label set": milliseconds(lambda: registry.change(name(3), labels={"stage": "x"})),
    }


@pytest.mark.slow
def test_ten_thousand_adapters(root: Path) -> None:
    fill(root, MANY, MANY)
    started = time.perf_counter()
    registry = Registry(root, "base")
    opening = time.perf_counter() - started
    took = timings(registry)
    print(f"\nopen: {opening:.2f} s; " + "; ".join(f"{what}: {ms:.2f} ms" for what, ms in took.items()))
    started = time.perf_counter()
    report = registry.gc(keep=1, dry_run=True)
    print(f"gc, dry: {time.perf_counter() - started:.2f} s, {len(report.versions)} versions")
    assert registry.recovered == []
    assert registry.count() == MANY
    assert opening < 5
    assert max(took.values()) < 50
    registry.close()


@pytest.mark.slow
def test_memory_does_not_grow_with_the_disk(tmp_path: Path) -> None:
    """Of a process that opens the registry and walks through every page of it."""
    grown = {}
    for count in (FEW, MANY):
        fill(tmp_path / str(count), count, count)
        grown[count] = int(subprocess.check_output([sys.executable, "-P", "-c", WALK, str(tmp_path / str(count))]))
    print(f"\nRSS grows by {grown[FEW] >> 10} KiB for {FEW}, {grown[MANY] >> 10} KiB for {MANY} adapters")
    assert grown[MANY] - grown[FEW] < 16 << 20


WALK = """
import resource, sys
from pathlib import Path
from onebase.adapters.registry import Registry
def rss():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
before = rss()
registry = Registry(Path(sys.argv[1]), "base")
after = None
for _ in range(2):
    while (page := registry.list(after=after, limit=100)).next is not None:
        after = page.next
    after = None
print(rss() - before)
"""


@pytest.mark.parametrize("what", ["first page of 100", "page of 100 in the middle", "get", "names of strangers"])
def test_look_ups_do_not_follow_the_number_of_names(what: str, scaled: dict[int, dict[str, float]]) -> None:
    """A page of a hundred times as many names takes about as long. The factor leaves room for a busy machine."""
    assert scaled[MANY][what] < 8 * scaled[FEW][what] + 5, scaled


@pytest.fixture(scope="module")
def scaled(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, float]]:
    """Number of names -> timings, over the same ten blobs."""
    found = {}
    for count in (FEW, MANY):
        root = tmp_path_factory.mktemp("scale") / str(count)
        fill(root, count, 10)
        registry = Registry(root, "base")
        found[count] = timings(registry)
        registry.close()
    return found

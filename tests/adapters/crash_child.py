"""A process that changes a registry at random, on a disk that fails, until somebody kills it.

Run as a program, it reads jobs from stdin, a JSON object a line, and forks a process for each: torch is imported once.
What happens comes out on stdout, a JSON object a line: ``begin`` before a change, then ``done``, ``refused``,
``failed`` or ``uncertain``; ``state``, all that the registry holds, whenever it is opened and after each failure.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from onebase.adapters.errors import AdapterError, StorageFailed, StorageUncertain
from onebase.adapters.registry import AdapterState, Registry
from onebase.adapters.registry.blobs import digest_of

NAMES = ["a", "b", "c"]
ALIASES = ["stable", "beta", "c"]  # one of them may be a name too
KEYS = ["team", "stage"]
CONTENTS = 6
Operation = list[Any]


def make_contents(root: Path) -> dict[str, Path]:
    """Digest -> folder of a tiny adapter, written by hand."""
    made = {}
    for index in range(CONTENTS):
        folder = root / str(index)
        folder.mkdir(parents=True, exist_ok=True)
        header = b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
        tensors = struct.pack("<Q", len(header)) + header + struct.pack("<2f", index, 1)
        (folder / "adapter_model.safetensors").write_bytes(tensors)
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
        made[digest_of(folder.iterdir())] = folder
    return made


def state_of(registry: Registry) -> dict[str, Any]:
    """All that the registry holds but times and ids. Versions: [number, digest]; imports: oldest first."""
    entries = registry.list(limit=1000).entries
    assert registry.count() == len(entries)
    names = {
        entry.name: {
            "current": entry.version,
            "pinned": entry.pinned,
            "labels": dict(entry.labels),
            "aliases": registry.aliases(entry.name),
            "versions": [[version.version, version.digest] for version in registry.versions(entry.name)],
        }
        for entry in entries
    }
    deleted = {gone.name: gone.last for gone in registry.deleted()}
    imports = [[item.name, item.source, str(item.state), item.version] for item in reversed(registry.imports())]
    return {"names": names, "deleted": deleted, "imports": imports}


def draw(rng: random.Random, digests: list[str]) -> Operation:
    """An operation and its arguments."""
    name = rng.choice(NAMES)
    version = rng.choice([None, None, 1, 2, 3])
    labels = {rng.choice(KEYS): rng.choice(["x", "y", None])}
    aliases = {rng.choice(ALIASES): rng.choice([None, 1, 2]) for _ in range(rng.randrange(3))}
    return rng.choice(
        [
            *[["push", name, rng.choice(digests)]] * 6,
            ["rollback", name, version],
            ["pin", name, rng.random() < 0.5],
            ["label", name, labels],
            ["alias", name, aliases, rng.random() < 0.5],
            ["delete", name],
            ["gc", rng.choice([None, 0, 1, 2])],
            ["begin_import", name, rng.choice(["hub:x", "hub:y"])],
            ["set_import", name, rng.choice(["fetching", "checking", "checking", "failed"])],
            ["finish_import", name, rng.choice(digests)],
        ]
    )


def perform(registry: Registry, contents: dict[str, Path], operation: Operation) -> Any:
    """Does it, and returns what there is to compare: the version that is current now, or the versions that went."""
    match operation:
        case ["push", name, digest]:
            return push(registry, name, contents[digest], None)
        case ["finish_import", name, digest]:
            return push(registry, name, contents[digest], unfinished(registry, name))
        case ["rollback", name, version]:
            return registry.rollback(name, version).version
        case ["pin", name, pinned]:
            return registry.change(name, pinned=pinned).version
        case ["label", name, labels]:
            return registry.change(name, labels=labels).version
        case ["alias", name, aliases, replace]:
            return registry.change(name, aliases=aliases, dropped=registry.aliases(name) if replace else ()).version
        case ["delete", name]:
            return [[entry.name, entry.version] for entry in registry.delete(name).entries]
        case ["gc", keep]:
            return [[entry.name, entry.version] for entry in registry.gc(keep=keep, dry_run=False).versions]
        case ["begin_import", name, source]:
            return registry.begin_import(name, source, None, "").source
        case ["set_import", name, state]:
            return registry.set_import(unfinished(registry, name) or "none", AdapterState(state), "why")
    raise AssertionError(operation)


def push(registry: Registry, name: str, folder: Path, job: str | None) -> int:
    blob = registry.stage_folder(folder)
    try:
        entry = registry.commit(name, blob, "test", family="LORA", rank=4, nbytes=8, job=job)
    except BaseException:
        registry.discard(blob)
        raise
    return entry.version


def unfinished(registry: Registry, name: str) -> str | None:
    return next((item.id for item in registry.imports(unfinished=True) if item.name == name), None)


def compile_something(root: Path, rng: random.Random) -> None:
    """As the engine does: beside the blobs, without asking."""
    try:
        blob = rng.choice(sorted((root / "blobs").iterdir()))
        (root / "compiled" / blob.name / "base").mkdir(parents=True, exist_ok=True)
        (root / "compiled" / blob.name / "base" / "1.safetensors").write_bytes(b"x")
    except (OSError, IndexError):
        return


def live(root: Path, seed: int, rate: int, contents: dict[str, Path]) -> None:
    """Until killed. rate: of a million calls that change the disk, how many fail."""
    if rate:
        configure = ctypes.CDLL(None).faults_configure
        configure.argtypes = [ctypes.c_char_p, ctypes.c_uint64, ctypes.c_uint64]
        configure(str(root).encode(), seed, rate)
    rng, registry = random.Random(seed), None
    while True:
        if registry is None:
            registry = try_open(root)
            continue
        attempt(registry, contents, draw(rng, sorted(contents)))
        compile_something(root, rng)
        if rng.random() < 0.03:
            registry.close()
            registry = None


def try_open(root: Path) -> Registry | None:
    try:
        registry = Registry(root, "base")
    except StorageFailed as error:
        say(unopened=error.message)
        return None
    say(state=state_of(registry), opened=True)
    return registry


def attempt(registry: Registry, contents: dict[str, Path], operation: Operation) -> None:
    say(begin=operation)
    try:
        result = perform(registry, contents, operation)
    except StorageUncertain as error:
        say(uncertain=error.message, state=state_of(registry))
    except StorageFailed as error:
        say(failed=error.message, state=state_of(registry))
    except AdapterError as error:
        say(refused=error.message)
    else:
        say(done=result)


def say(**what: Any) -> None:
    os.write(1, json.dumps(what).encode() + b"\n")


def in_fork(work: Callable[[], None]) -> None:
    child = os.fork()
    if child == 0:
        say(pid=os.getpid())
        try:
            work()
        except BaseException as error:  # the parent shall see it, whatever it is
            say(defect=repr(error))
        os._exit(1)
    os.waitpid(child, 0)
    os.write(1, b"\n")  # the child may have died within a line
    say(dead=child)


def main() -> None:
    contents = make_contents(Path(sys.argv[1]))
    for line in sys.stdin:
        job = json.loads(line)
        in_fork(lambda job=job: live(Path(job["root"]), job["seed"], job["rate"], contents))  # type: ignore[misc]


if __name__ == "__main__":
    main()

"""Uploads made to hurt are refused in under a second, with little memory, and leave nothing on the disk.

What is wrong with single fields and tensors stands in test_adapter_refusals.py; this is about size and time, through
the stage that uploads really take.
"""

from __future__ import annotations

import re
import struct
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from onebase.adapters import check
from onebase.adapters.check import MAX_CONFIG_BYTES, MAX_FILES
from onebase.adapters.errors import AdapterError, AdapterNameInvalid, AdapterRejected, AdapterTooLarge
from onebase.adapters.registry import Registry
from onebase.adapters.registry.blobs import Stage, StageFile

from .registry_helpers import TENSORS, on_disk, push

CONFIG = b'{"peft_type":"LORA","r":4,"lora_alpha":8}'
ONE_TENSOR = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
FIRST_CHUNK = 1 << 20
HEADROOM = 24 << 20  # a chunk of a finite check, and change


def safetensors(header: bytes, data: bytes = b"", claim: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if claim is None else claim) + header + data


def tiny_tensors(count: int, field: str = "data_offsets") -> bytes:
    entry = '"%d":{"dtype":"U8","shape":[1],"' + field + '":[%d,%d]}'
    return safetensors(b"{" + ",".join(entry % (i, i, i + 1) for i in range(count)).encode() + b"}", bytes(count))


HOSTILE: dict[str, tuple[Callable[[], bytes], Callable[[], bytes], str]] = {
    "a header of a terabyte": (lambda: CONFIG, lambda: safetensors(b"{}", claim=1 << 40), "claims a header"),
    "a tensor of a terabyte": (
        lambda: CONFIG,
        lambda: safetensors(b'{"a":{"dtype":"F32","shape":[274877906944],"data_offsets":[0,1099511627776]}}', bytes(8)),
        "behind the end",
    ),
    "nothing of a huge shape": (
        lambda: CONFIG,
        lambda: safetensors(b'{"a":{"dtype":"F32","shape":[0,9223372036854775807],"data_offsets":[0,0]}}'),
        "out of range",
    ),
    "overlapping tensors": (
        lambda: CONFIG,
        lambda: safetensors(
            b'{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]},"b":{"dtype":"U8","shape":[8],"data_offsets":[4,12]}}',
            bytes(12),
        ),
        "overlap",
    ),
    "a tensor twice": (
        lambda: CONFIG,
        lambda: safetensors(ONE_TENSOR[:-1] + b"," + ONE_TENSOR[1:], b"x"),
        "appears twice",
    ),
    "a config key twice": (lambda: CONFIG[:-1] + b',"r":8}', lambda: safetensors(ONE_TENSOR, b"x"), "appears twice"),
    "10^6 tiny tensors": (lambda: CONFIG, lambda: tiny_tensors(1_000_000), "limit is 33554432"),
    "as many as the header holds": (lambda: CONFIG, lambda: tiny_tensors(450_000), "more than 100000 tensors"),
    "as many, spelled otherwise": (
        lambda: CONFIG,
        lambda: tiny_tensors(450_000, r"data\u005foffsets"),
        "more than 100000 tensors",
    ),
    "the most that are allowed, and a hole": (lambda: CONFIG, lambda: tiny_tensors(100_000)[:-1], "behind the end"),
    "10^6 levels of config": (
        lambda: b'{"peft_type":' + b"[" * 500_000 + b"]" * 500_000 + b"}",
        lambda: safetensors(ONE_TENSOR, b"x"),
        "deeper than 16",
    ),
    "10^7 levels of header": (lambda: CONFIG, lambda: safetensors(b'{"a":' + b"[" * 10_000_000), "not an object of"),
    "10^6 levels of metadata": (
        lambda: CONFIG,
        lambda: safetensors(b'{"__metadata__":' + b'{"a":' * 1_000_000),
        "__metadata__ is not valid",
    ),
    "30 MB of blanks": (lambda: CONFIG, lambda: safetensors(b"{" + b" " * 30_000_000), "not valid JSON"),
    "a name of 30 MB": (lambda: CONFIG, lambda: safetensors(b'{"' + b"a" * 30_000_000 + b'":1}'), "1,024 characters"),
    "30 MB of escapes": (lambda: CONFIG, lambda: safetensors(b'{"' + b"\\" * 30_000_000), "1,024 characters"),
    "a number of 10^6 digits": (
        lambda: b'{"peft_type":"LORA","r":' + b"9" * 1_000_000 + b"}",
        lambda: safetensors(ONE_TENSOR, b"x"),
        "not valid JSON",
    ),
}


# tracemalloc takes seconds for 100,000 entries: see test_memory_follows_the_limit_and_not_the_claim.
SLOW_TO_TRACE = ("as many, spelled otherwise", "the most that are allowed, and a hole")


@contextmanager
def flat(limit: int) -> Iterator[None]:
    """Fails where Python's memory grows by more than ``limit`` bytes."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < limit, f"{peak:,} bytes"


def send(stage: Stage, config: bytes, tensors: bytes) -> None:
    for name, content in (("adapter_config.json", config), (TENSORS, tensors)):
        with stage.open(name) as file:
            for start in range(0, len(content), FIRST_CHUNK):
                file.write(memoryview(content)[start : start + FIRST_CHUNK])


def refused(registry: Registry, config: bytes, tensors: bytes, message: str) -> float:
    """Sends both files and returns how long the refusal took."""
    with registry.stage() as stage:
        send(stage, config, tensors)
        started = time.process_time()
        with pytest.raises((AdapterRejected, AdapterTooLarge), match=message) as refusal:
            stage.finish()
        assert len(refusal.value.message) < 500
        return time.process_time() - started


BLOW_UP = (
    5  # seconds of processor time: each takes less than one on a quiet machine, and minutes where a check is not linear
)


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_cost_little(case: str, registry: Registry, root: Path) -> None:
    config, tensors, message = HOSTILE[case][0](), HOSTILE[case][1](), HOSTILE[case][2]
    assert min(refused(registry, config, tensors, message) for _ in range(2)) < BLOW_UP
    assert on_disk(root) == set()
    if case not in SLOW_TO_TRACE:
        with flat(2 * min(len(config) + len(tensors), 32 << 20) + HEADROOM):
            refused(registry, config, tensors, message)


def test_memory_follows_the_limit_and_not_the_claim(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "MAX_TENSORS", 5_000)
    tensors = tiny_tensors(450_000, r"data\u005foffsets")
    with flat(2 * len(tensors) + HEADROOM):
        refused(registry, CONFIG, tensors, "more than")


def test_many_files_hold_no_more_tensors_than_one(registry: Registry, root: Path) -> None:
    with registry.stage() as stage:
        with stage.open("adapter_config.json") as file:
            file.write(CONFIG)
        for index in range(3):
            names = ",".join(
                f'"{index}-{i}":{{"dtype":"U8","shape":[1],"data_offsets":[{i},{i + 1}]}}' for i in range(40_000)
            )
            with stage.open(f"{index}.safetensors") as file:
                file.write(safetensors(f"{{{names}}}".encode(), bytes(40_000)))
        with pytest.raises(AdapterTooLarge, match=r"2\.safetensors: more than 100000 tensors"):
            stage.finish()
    assert on_disk(root) == set()


def test_a_config_of_200_megabytes_is_refused_while_it_arrives(registry: Registry, root: Path) -> None:
    with flat(4 << 20), registry.stage() as stage, stage.open("adapter_config.json") as file:
        with pytest.raises(AdapterTooLarge, match=r"adapter_config\.json is over 1048576 bytes"):
            write_zeros(file, 200 << 20)
        (folder,) = (root / "staging").iterdir()
        assert sum(entry.stat().st_size for entry in folder.iterdir()) <= MAX_CONFIG_BYTES
    assert on_disk(root) == set()


def write_zeros(file: StageFile, nbytes: int) -> None:
    chunk = bytes(64 << 10)
    for _ in range(0, nbytes, len(chunk)):
        file.write(chunk)


def test_the_number_of_files_is_bounded_while_they_arrive(registry: Registry, root: Path) -> None:
    with registry.stage() as stage:
        for index in range(MAX_FILES):
            with stage.open(f"{index}.safetensors") as file:
                file.write(b"x")
        with pytest.raises(AdapterTooLarge, match="more than 64 files"):
            stage.open("one-more.safetensors")
        (folder,) = (root / "staging").iterdir()
        assert len(list(folder.iterdir())) == MAX_FILES


BAD_FILES = {
    "above": "../adapter_config.json",
    "far above": "../" * 40 + "etc/passwd",
    "below": "sub/adapter_model.safetensors",
    "absolute": "/tmp/adapter_model.safetensors",
    "dots": "..",
    "dot": ".",
    "nothing": "",
    "NUL": "adapter_model.safetensors\0",
    "NUL within": "adapter_config.json\0.safetensors",
    "newline": "adapter_config.json\n",
    "newline within": "adapter\n_model.safetensors",
    "carriage return": "adapter_config.json\r",
    "comma": "a,b.safetensors",
    "backslash": "..\\adapter_model.safetensors",
    "fullwidth": "ａdapter_model.safetensors",
    "fullwidth dot": "adapter_config．json",
    "fullwidth slash": "sub／adapter_model.safetensors",
    "Cyrillic": "аdapter_config.json",
    "Greek": "adapter_cοnfig.json",
    "right to left": "adapter_\u202enosj.gifnoc",
    "zero width": "adapter_config\u200b.json",
    "soft hyphen": "adapter_con\u00adfig.json",
    "combining": "adapter_config.json\u0301",
    "Arabic digit": "model-٣.safetensors",
    "surrogate": "adapter_model\ud800.safetensors",
    "hidden": ".safetensors",
    "device": "CON",
    "5,000 characters": "x" * 5000 + ".safetensors",
    "blank": "adapter_config.json ",
    "capitals": "ADAPTER_CONFIG.JSON",
    "percent": "%2e%2e%2fadapter_config.json",
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file_names_write_nothing(case: str, registry: Registry, root: Path) -> None:
    before = sorted(root.rglob("*"))
    with registry.stage() as stage:
        with pytest.raises(AdapterRejected) as refusal:
            stage.open(BAD_FILES[case])
        (folder,) = (root / "staging").iterdir()
        assert list(folder.iterdir()) == []
    assert refusal.value.param == "files"
    assert len(refusal.value.message) < 900
    assert "\n" not in refusal.value.message
    assert sorted(root.rglob("*")) == before
    assert sorted(path.name for path in root.parent.iterdir()) == ["data"]


BAD_NAMES = {case: re.sub(r"\.safetensors|adapter_|\.json", "", name) for case, name in BAD_FILES.items()}
BAD_NAMES = {case: name for case, name in BAD_NAMES.items() if case not in ("device", "capitals")}
BAD_NAMES |= {"hidden": ".hidden", "version": "a@1", "fullwidth dot": "a．b", "Greek": "cοnfig"}


@pytest.mark.parametrize("case", BAD_NAMES)
def test_bad_adapter_names_write_nothing(case: str, registry: Registry, root: Path, adapter: Path) -> None:
    push(registry, "a", adapter)
    blob = registry.stage_folder(adapter)
    before = registry.list(), registry.imports(), sorted(root.rglob("*"))
    calls: list[Callable[[str], object]] = [
        lambda name: registry.commit(name, blob, "test", family="LORA", rank=4, nbytes=1),
        lambda name: registry.begin_import(name, "hf:x/y", None, ""),
        lambda name: registry.change("a", aliases={name: 1}),
        lambda name: registry.change(name, pinned=True),
        lambda name: registry.change(name, labels={}),
        registry.delete,
        registry.versions,
    ]
    for call in calls:
        with pytest.raises(AdapterNameInvalid) as refusal:
            call(BAD_NAMES[case])
        assert len(refusal.value.message) < 900
        assert "\n" not in refusal.value.message
    assert (registry.list(), registry.imports(), sorted(root.rglob("*"))) == before


def test_files_of_a_folder_may_be_read_no_less_strictly(registry: Registry, root: Path, adapter: Path) -> None:
    """A folder of the server is copied through the same stage."""
    (adapter / "аdapter_config.json").write_bytes(CONFIG)
    with pytest.raises(AdapterError):
        registry.stage_folder(adapter)
    assert on_disk(root) == set()

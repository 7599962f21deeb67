"""Whatever the bytes, the header reader answers or refuses, and agrees with the safetensors library."""

from __future__ import annotations

import contextlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from onebase.adapters.check import check_finite, check_folder, read_values
from onebase.adapters.errors import AdapterRejected, AdapterTooLarge
from onebase.adapters.safetensors_header import DTYPES, read_header

QUICK = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

SIZES = st.one_of(st.integers(-2, 12), st.booleans(), st.sampled_from([1 << 40, 1 << 63, 1 << 64, 1.0, None, "4"]))
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPES, "F4", 3, None]),
        "shape": st.lists(SIZES, max_size=3),
        "data_offsets": st.lists(SIZES, min_size=1, max_size=3),
    }
)
HEADER = st.dictionaries(st.text(max_size=4) | st.just("__metadata__"), ENTRY | st.none() | st.just({}), max_size=3)


def judge(path: Path) -> bool:
    """Whether ours accepts; what it accepts, the library has to read too."""
    try:
        tensors = read_header(path)
    except (AdapterRejected, AdapterTooLarge):
        return False
    with safetensors.safe_open(path, framework="pt") as library:
        assert set(library.keys()) == set(tensors)
    return True


@QUICK
@given(raw=st.binary(max_size=80), length=st.integers(0, 100) | st.sampled_from([1 << 31, 1 << 63]))
def test_random_bytes(raw: bytes, length: int, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", length) + raw)
    judge(tmp_path / "a.safetensors")


@QUICK
@given(header=HEADER, data=st.integers(0, 24))
def test_random_headers(header: dict[str, Any], data: int, tmp_path: Path) -> None:
    raw = json.dumps(header).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(data))
    judge(tmp_path / "a.safetensors")


@QUICK
@given(data=st.data())
def test_a_sound_adapter_with_bytes_changed(data: st.DataObject, adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    whole = adapter.parent / "whole"
    if not whole.exists():
        whole.write_bytes(file.read_bytes())
    raw = bytearray(whole.read_bytes())
    length = struct.unpack("<Q", raw[:8])[0]
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, 8 + length))] = data.draw(st.integers(0, 255))
    file.write_bytes(raw)
    if judge(file):
        with contextlib.suppress(AdapterRejected, AdapterTooLarge):
            check_finite(check_folder(adapter))


@pytest.mark.parametrize("name", DTYPES)
def test_reads_what_the_library_wrote(name: str, tmp_path: Path) -> None:
    values = torch.arange(6).reshape(2, 3).to(DTYPES[name])
    file = tmp_path / "a.safetensors"
    save_file({"first": values, "none": values[:0].contiguous(), "x.é": torch.ones(1)}, file, metadata={"a": '{"b"'})
    tensors = read_header(file)
    assert set(tensors) == set(load_file(file))
    with file.open("rb") as stream:
        info = tensors["first"]
        assert torch.equal(read_values(stream, info, 0, info.nbytes).view(info.shape), values)
        assert read_values(stream, tensors["none"], 0, 0).numel() == 0

"""Every case compiled, stored and read again: equal in every field and every bit."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from onebase.adapters.formats import compile_folder
from onebase.adapters.packing import PackedInstruction, PackedProgram, pack
from onebase.adapters.tiers.compiled import CompiledForms
from onebase.serve.engine.config import EngineConfig
from onebase.serve.model.loader import LoadedModel, load_model

from .case import Case, all_cases, made


@pytest.fixture(scope="module")
def base_of(checkpoint: Callable[..., Path]) -> Callable[[str], LoadedModel]:
    @functools.cache
    def load(architecture: str) -> LoadedModel:
        return load_model(EngineConfig(model=str(checkpoint(architecture)), dtype="float32", device="cpu"))

    return load


def _bits(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def _plain(one: PackedInstruction) -> dict[str, Any]:
    kept = {item.name: getattr(one.instruction, item.name) for item in fields(one.instruction)}
    return {name: value for name, value in kept.items() if name not in one.slots}


def assert_equal(one: PackedProgram, two: PackedProgram) -> None:
    for name in ("digest", "family", "rank", "sites", "traits", "operands", "head"):
        assert getattr(one, name) == getattr(two, name), name
    assert (one.data.dtype, _bits(one.data)) == (two.data.dtype, _bits(two.data))
    assert {key: _bits(flat) for key, flat in one.shared.items()} == {k: _bits(f) for k, f in two.shared.items()}
    assert one.extra.keys() == two.extra.keys()
    for path, items in one.extra.items():
        for a, b in zip(items, two.extra[path], strict=True):
            assert type(a.instruction) is type(b.instruction)
            assert (a.slots, _plain(a)) == (b.slots, _plain(b))
            assert [type(value) for value in _plain(a).values()] == [type(value) for value in _plain(b).values()]


@pytest.mark.parametrize("case", all_cases(), ids=lambda case: case.name)
def test_a_form_is_what_was_packed(
    case: Case,
    base_of: Callable[[str], LoadedModel],
    checkpoint: Callable[..., Path],
    families_cache: Path,
    tmp_path: Path,
) -> None:
    architecture = case.architectures[0]
    folder = made(case, architecture, checkpoint(architecture), families_cache, case.prompt).adapter
    assert folder is not None
    for dtype in (torch.float32, torch.bfloat16):
        packed = pack(compile_folder(folder, base_of(architecture), "d" * 64), dtype)
        forms = CompiledForms(tmp_path, "base", dtype)
        forms.write(packed)
        again = forms.read("d" * 64)
        assert again is not None
        assert_equal(packed, again)
    assert len(list((tmp_path / ("d" * 64)).iterdir())) == 2
    for file in (tmp_path / ("d" * 64)).iterdir():
        with safe_open(file, "pt") as stored:  # the library reads it too
            assert {"data", "program", "checksum"} <= set(stored.keys())

"""Configurations: the table goes first, the heuristic answers for the rest, and no key lacks what shapes a kernel."""

from __future__ import annotations

import inspect
import json
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from onebase.kernels.config import TABLES, Config, Configs, Shape, dump, file_name, heuristic, load, rank_class
from onebase.kernels.tiles import FEW_ROWS, RANK_BLOCK

SHAPE = Shape.of("shrink", torch.bfloat16, 4096, (4096, 1024, 1024), rank=30, block_m=16, rows=60, distinct=60)
OTHER = Config(block_r=64, block=64, splits=4, num_warps=8, num_stages=2)


def test_the_table_goes_before_the_heuristic() -> None:
    configs = Configs({SHAPE: OTHER})
    assert configs.get(SHAPE) == OTHER
    assert Configs().get(SHAPE) == heuristic(SHAPE) != OTHER


CHANGES: list[dict[str, Any]] = [
    {"op": "expand"},
    {"dtype": "float16"},
    {"h_in": 2048},
    {"slices": (4096, 1024)},
    {"slices": (4096, 1024, 2048)},
    {"rank": 64},
    {"block_m": 32},
    {"rows": 128},
    {"distinct": 32},
]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_every_field_keeps_entries_apart(change: dict[str, Any]) -> None:
    configs = Configs({SHAPE: OTHER})
    assert configs.get(replace(SHAPE, **change)) != OTHER


def test_every_field_of_the_key_is_tried_above() -> None:
    """So that a field that is added gets its case."""
    assert {name for change in CHANGES for name in change} == {field.name for field in fields(Shape)}


# The constants that a kernel is compiled for, by where they come from.
CHOSEN = {"BLOCK_R", "BLOCK_K", "BLOCK_N", "SPLITS", "STAGES"}  # by the configuration
OF_KEY = {"BLOCK_M", "TOKEN"}
OF_TABLES = {"ALIGN", "WIDE", "FIELDS", "TILE_FIELDS"}  # and their device


def test_every_constant_of_a_kernel_is_of_its_configuration_or_key() -> None:
    kernels = pytest.importorskip("onebase.kernels.matmul_triton")
    for name in ("shrink_kernel", "expand_kernel", "shrink_rows_kernel", "expand_rows_kernel"):
        parameters = inspect.signature(getattr(kernels, name).fn).parameters.values()
        constants = {one.name for one in parameters if one.annotation == "tl.constexpr"}
        assert {"BLOCK_R", "SPLITS"} < constants <= CHOSEN | OF_KEY | OF_TABLES


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_parts_that_an_expand_sums_follow_from_its_own_key(change: dict[str, Any]) -> None:
    """The shrink before it may be of more sites or of a wider rank, and have another key; without a table it splits K
    alike. With one it need not: an expand takes as many parts as its xa has."""
    alike = heuristic(replace(SHAPE, **(change | {"op": "shrink"}))).splits == heuristic(SHAPE).splits
    assert alike or change.keys() <= {"h_in", "block_m"}


def test_a_shrink_of_a_few_rows_takes_the_parts_that_tiles_have() -> None:
    few = replace(SHAPE, block_m=FEW_ROWS)
    assert Configs({few: replace(OTHER, block_r=RANK_BLOCK)}).tuned
    with pytest.raises(ValueError, match=r"block_r: 64 of .* allowed for a few rows is 16"):
        Configs({few: OTHER})


def test_classes_round_up_and_are_few() -> None:
    assert [rank_class(rank) for rank in (0, 1, 16, 17, 77, 256, 300, 512, 4000)] == [
        16, 16, 16, 32, 128, 256, 512, 512, 512,
    ]  # fmt: skip
    assert (SHAPE.rank, SHAPE.rows, SHAPE.distinct) == (32, 64, 64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("block_m", [FEW_ROWS, 16, 32, 64])
def test_the_heuristic_keeps_to_its_rules(dtype: torch.dtype, block_m: int) -> None:
    size = dtype.itemsize
    for rank in (1, 16, 77, 512):
        shape = Shape.of("shrink", dtype, 8192, (64,), rank=rank, block_m=block_m, rows=64, distinct=64)
        shrink, expand = heuristic(shape), heuristic(replace(shape, op="expand"))
        assert 16 <= shrink.block_r <= (16 if block_m == FEW_ROWS else 128 // size)
        assert shrink.block * size == {FEW_ROWS: 512, 16: 256}.get(block_m, 128)
        assert shrink.splits == (8 if block_m <= 16 else 4)
        assert (expand.block, expand.splits) == ({FEW_ROWS: 512 // size, 16: 64}.get(block_m, 128), 1)


@pytest.mark.parametrize("block_m", [FEW_ROWS, 16, 64])
def test_parts_of_a_sum_are_powers_of_two_no_shorter_than_worthwhile(block_m: int) -> None:
    for h_in in (64, 576, 3072, 4096, 14336):
        for rows in (1, 64, 4096):
            shape = Shape.of("shrink", torch.bfloat16, h_in, (64,), rank=16, block_m=block_m, rows=rows, distinct=1)
            splits = heuristic(shape).splits
            assert splits.bit_count() == 1
            assert splits == 1 or h_in >= 512 * splits
    with pytest.raises(ValueError, match="splits: 3"):
        Configs({SHAPE: Config(16, 64, splits=3)})


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / file_name("NVIDIA H200")
    assert path.name == "nvidia_h200.json"
    tuned = {SHAPE: OTHER, replace(SHAPE, op="expand", slices=(1024,)): Config(32, 128)}
    dump(path, "NVIDIA H200", tuned)
    assert load(path) == tuned


@pytest.mark.parametrize("field", [*(f.name for f in fields(Shape)), "config"])
def test_an_entry_that_lacks_a_field_is_refused(tmp_path: Path, field: str) -> None:
    entry = {**asdict(SHAPE), "config": asdict(OTHER)}
    del entry[field]
    path = tmp_path / "device.json"
    path.write_text(json.dumps({"device": "d", "entries": [entry]}))
    with pytest.raises(ValueError, match="block_r" if field == "config" else field):
        load(path)


def test_unknown_fields_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "device.json"
    entry = {**asdict(SHAPE), "config": asdict(OTHER) | {"maxnreg": 64}}
    path.write_text(json.dumps({"device": "d", "entries": [entry]}))
    with pytest.raises(ValueError, match="maxnreg"):
        load(path)


def test_shipped_tables_can_be_read() -> None:
    for path in TABLES.glob("*.json"):
        assert load(path)
        assert file_name(json.loads(path.read_text())["device"]) == path.name


def test_no_table_no_entries(tmp_path: Path) -> None:
    assert load(tmp_path / "none.json") == {}
    assert Configs.of_device(torch.device("cpu")).tuned == {}


def test_an_expand_never_parts_the_pairs_of_a_rotation() -> None:
    shape = Shape.of("expand", torch.bfloat16, 64, (64,), rank=16, block_m=16, rows=1, distinct=1)
    with pytest.raises(ValueError, match="multiples of 64"):
        Configs({shape: Config(16, 32)})
    assert Configs({shape: Config(16, 128)}).get(shape).block == 128
    assert all(heuristic(replace(shape, block_m=rows)).block % 64 == 0 for rows in (FEW_ROWS, 16, 32, 64))

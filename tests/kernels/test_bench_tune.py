"""How a table of configurations is made, without the device it is for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from onebase.bench.kernels_tune import Bench, search, tune, tuned
from onebase.kernels.config import Config, Configs, dump, load

from .matmul_worlds import needs_interpreter

START = Config(block_r=16, block=64)
OPTIONS = {"block_r": (16, 32), "block": (64, 128), "splits": (1, 4)}


def test_the_search_finds_fields_that_pay_only_together() -> None:
    """A longer block pays only once K is split, which is tried after it: hence the second round."""
    best = search(START, OPTIONS, lambda c: 10 - c.splits - (c.block == 128) * (3 if c.splits == 4 else -2))
    assert best == Config(block_r=16, block=128, splits=4)


def test_what_is_hardly_faster_is_not_worth_an_entry() -> None:
    assert search(START, OPTIONS, lambda c: 1.0 - 0.02 * (c.block == 128)) is None
    assert search(START, OPTIONS, lambda c: float("inf") if c != START else 1.0) is None


@needs_interpreter
def test_entries_are_what_the_kernels_look_up(tmp_path: Path) -> None:
    """Each side runs with the configuration under trial, and serving finds what was chosen by the same key."""
    buffer, seen = torch.randn(1 << 10), []

    def clock(side: object) -> float:
        side()  # type: ignore[operator]
        seen.append(side)
        return 1.0 / len(seen)

    *_, found = tuned(buffer, [(32, (48, 16))], [4], [2], clock)
    assert {(shape.op, shape.slices) for shape in found} >= {("shrink", (48, 16)), ("expand", (48, 16))}
    dump(tmp_path / "t.json", "t", found)
    bench = Bench.of((32, (48, 16)), 4, 2, 2, buffer, 1)
    configs = Configs(load(tmp_path / "t.json"))
    assert configs.get(bench.shape("shrink")) == found[bench.shape("shrink")]


@needs_interpreter
def test_what_fails_or_gives_other_numbers_is_no_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    def clock(side: object) -> float:
        if len(seen) % 2:
            raise RuntimeError("the compiler gave up")
        seen.append(side)
        side()  # type: ignore[operator]
        return 1.0 / len(seen)

    buffer, seen = torch.randn(1 << 10), list[object]()
    assert [*tuned(buffer, [(32, (16,))], [4], [1], clock)] == [{}], "after the first, none compiles"
    seen.clear()
    monkeypatch.setattr(Bench, "outputs", lambda self, configs: [torch.full((1,), 1.0 + len(configs.tuned))])
    *_, found = tuned(buffer, [(32, (16,))], [4], [1], lambda side: 1.0 / (seen.append(side) or len(seen)))  # type: ignore[func-returns-value]
    assert found == {}


@needs_interpreter
def test_a_tuned_configuration_is_launched_and_warmed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    from onebase.kernels import matmul_triton

    launched: list[int] = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> object:
            return lambda *args, **kwargs: launched.append(kwargs["num_warps"])

    bench = Bench.of((32, (48, 16)), 4, 2, 2, torch.zeros(1 << 14), 1)
    configs = Configs(
        {bench.shape("shrink"): Config(16, 32, num_warps=2), bench.shape("expand"): Config(16, 128, 1, 4)}
    )
    monkeypatch.setattr(matmul_triton, "shrink_rows_kernel", Kernel())
    monkeypatch.setattr(matmul_triton, "expand_rows_kernel", Kernel())
    bench.shrink(configs)()
    assert launched == [2] * len(bench.groups)
    launched.clear()
    matmul_triton.TritonKernels(bench.tables, configs).warm_up()
    assert {2, 4, 8} <= set(launched)


def test_a_table_is_for_cuda_only(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="device: cpu"):
        tune("cpu", tmp_path)

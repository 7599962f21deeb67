"""Products of few rows against float64, and the choice between the kernel and torch's linear."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import linear

pytest.importorskip("triton")

from onebase.kernels import few_rows
from onebase.kernels.few_rows import MOST_ROWS, FewRows, Shape, Tile
from onebase.serve.model.few import use_few_rows
from onebase.serve.model.packed import join_linears

needs_interpreter = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="set TRITON_INTERPRET=1 (make test does) or run on CUDA"
)
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
CPU = torch.device("cpu")


def always(tile: Tile, weight: Tensor) -> FewRows:
    return FewRows({Shape.of(rows, weight): tile for rows in (1, MOST_ROWS)})


def check(
    rows: int, n: int, k: int, dtype: torch.dtype, bias: bool, gap: int, tile: Tile, device: torch.device
) -> None:
    """gap: what lies between two rows of x, poisoned, as all that a launch may not read or has to write."""
    generator = torch.Generator().manual_seed(rows + n + k + gap)
    x = torch.full((rows, k + gap), float("nan"), dtype=dtype, device=device)[:, :k]
    x.copy_(torch.randn(rows, k, generator=generator))
    weight = (torch.randn(n, k, generator=generator) / k**0.5).to(device, dtype)
    offset = torch.randn(n, generator=generator).to(device, dtype) if bias else None
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what is allocated with NaN
    try:
        got = always(tile, weight).product(x[None], weight, offset)
    finally:
        torch.use_deterministic_algorithms(False)
    want = linear(x.double(), weight.double(), None if offset is None else offset.double())
    assert got.shape == (1, rows, n)
    assert got.dtype is dtype
    assert (got[0].double() - want).abs().max() <= TOLERANCE[dtype] * max(1.0, float(want.abs().max()))


@needs_interpreter
@settings(deadline=None, max_examples=25)
@given(
    rows=st.integers(1, 6),
    n=st.integers(1, 40),
    k=st.sampled_from([16, 48, 64, 100, 144]),
    dtype=st.sampled_from(list(TOLERANCE)),
    bias=st.booleans(),
    gap=st.sampled_from([0, 3, 16]),
    tile=st.sampled_from([Tile(8, 64, 4), Tile(4, 32, 4), Tile(1, 256, 4)]),
)
def test_products_are_exact_for_any_rows(
    rows: int, n: int, k: int, dtype: torch.dtype, bias: bool, gap: int, tile: Tile
) -> None:
    check(rows, n, k, dtype, bias, gap, tile, CPU)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("tile", sorted({*few_rows.TILES[1], *few_rows.TILES[MOST_ROWS]}, key=str), ids=str)
def test_cuda_products_are_exact(rows: int, dtype: torch.dtype, tile: Tile) -> None:
    check(rows, 1027, 4144, dtype, True, 16, tile, torch.device("cuda"))


class Turns:
    """A clock: torch's linear, which is timed first for each shape, takes one second, a tile what ``seconds`` says."""

    def __init__(self, seconds: list[float]) -> None:
        self.seconds, self.timed = seconds, 0

    def __call__(self, step: Callable[[], object]) -> float:
        step()
        self.timed += 1
        return [1.0, *self.seconds][(self.timed - 1) % (1 + len(self.seconds))]


@needs_interpreter
@pytest.mark.parametrize(("seconds", "best"), [([0.9, 0.5, 0.7], 1), ([1.1, 2.0, 1.5], None)])
def test_the_fastest_is_chosen(seconds: list[float], best: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = (Tile(8, 64, 4), Tile(4, 32, 4), Tile(1, 16, 4))
    monkeypatch.setattr(few_rows, "TILES", {1: tiles, MOST_ROWS: tiles})
    weight = torch.randn(24, 48)
    few = FewRows.on([weight, weight.clone(), torch.randn(4, 7)], clock=Turns(seconds))
    expected = {} if best is None else {Shape.of(rows, weight): tiles[best] for rows in (1, MOST_ROWS)}
    assert few._chosen == expected


def test_a_trial_that_fails_leaves_torchs_linear(caplog: pytest.LogCaptureFixture) -> None:
    def broken(step: Callable[[], object]) -> float:
        raise RuntimeError("no device")

    caplog.set_level("INFO")
    weight, x = torch.randn(8, 16), torch.randn(1, 16)
    few = FewRows.on([weight], clock=broken)
    assert torch.equal(few.product(x, weight), linear(x, weight))
    assert "no device" in caplog.text


@needs_interpreter
def test_modules_of_a_model_take_it_joint_or_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = (Tile(4, 32, 4),)
    monkeypatch.setattr(few_rows, "TILES", {1: tiles, MOST_ROWS: tiles})
    q, k, down = nn.Linear(32, 24), nn.Linear(32, 8, bias=False), nn.Linear(32, 16)
    launched: list[int] = []
    kernel = few_rows.run
    monkeypatch.setattr(few_rows, "run", lambda x, *rest: (launched.append(len(x)), kernel(x, *rest))[1])
    x = torch.randn(1, 3, 32)
    with torch.no_grad():
        expected = [module(x) for module in (q, k, down)]
        join_linears([[q, k], [down]])
        use_few_rows([q, k, down], clock=Turns([0.5]))
        launched.clear()
        got = [module(x) for module in (q, k, down)]
    assert launched == [3, 3]
    for have, want in zip(got, expected, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-5)

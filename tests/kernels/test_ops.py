"""Every row instruction: the batched body equals its reference, alone, over many segments, and through the table."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from onebase.kernels.instructions import InstructionTable
from onebase.kernels.ops.instruction import Phase, RowInstruction
from onebase.kernels.plan import BatchPlan, Segment

IN, OUT = 48, 64
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 0.15}
_FILES = sorted(Path(__file__).parent.glob("makers_*.py"))
MAKERS: dict[type[RowInstruction], Any] = {}
for _file in _FILES:
    MAKERS.update(importlib.import_module(f".{_file.stem}", __package__).MAKERS)
KINDS = sorted(MAKERS, key=lambda kind: kind.__name__)


def _draw(seed: int, dtype: torch.dtype) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: (torch.randn(*shape, generator=generator, dtype=torch.float64) * 0.5).to(dtype)


def _sizes(kind: type[RowInstruction]) -> tuple[int, int]:
    """Widths of the source and of the target of a kind's delta."""
    return {Phase.INPUT: (IN, IN), Phase.MAP: (OUT, OUT), Phase.ADD: (IN, OUT)}[kind.phase]


def _kinds(kind: type) -> Iterator[type]:
    for child in kind.__subclasses__():
        yield from _kinds(child)
        if not getattr(child, "__abstractmethods__", None) and hasattr(child, "phase"):
            yield child


def test_every_row_instruction_has_a_maker() -> None:
    """By name: a dataclass with slots leaves its first draft among the subclasses."""
    assert {kind.__name__ for kind in _kinds(RowInstruction)} == {kind.__name__ for kind in MAKERS}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_delta_equals_the_reference(kind: type[RowInstruction], dtype: torch.dtype) -> None:
    op = MAKERS[kind](_draw(1, dtype), IN, OUT)
    source, target = _sizes(kind)
    rows = _draw(2, dtype)(7, source)
    got, expected = op.delta(rows), op.reference(rows)
    assert got.shape == (7, target)
    scale = 1 + float(expected.abs().max())
    torch.testing.assert_close(got.double() / scale, expected / scale, atol=TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize("lengths", [(1, 1, 1), (4, 1, 3), (9,)], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_batched_segments_equal_each_alone(kind: type[RowInstruction], lengths: tuple[int, ...]) -> None:
    ops = [MAKERS[kind](_draw(seed, torch.float64), IN, OUT) for seed in range(len(lengths))]
    rows = _draw(9, torch.float64)(sum(lengths), _sizes(kind)[0])
    got = kind.batched(ops, lengths, rows)
    parts = torch.split(rows, list(lengths))
    expected = torch.cat([op.reference(part) for op, part in zip(ops, parts, strict=True)])
    torch.testing.assert_close(got, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_the_table_adds_scaled_deltas_and_leaves_other_rows_alone(kind: type[RowInstruction]) -> None:
    """Row 0 and 9 are base rows, rows 3 and 4 have two programs, and the second program has a scale."""
    table = InstructionTable()
    ops = {handle: MAKERS[kind](_draw(handle, torch.float64), IN, OUT) for handle in (1, 2)}
    for handle, op in ops.items():
        table.install(handle, {"site": (op,)})
    plan = BatchPlan(10, [Segment(1, 4, 1), Segment(3, 6, 2, -0.5)])
    x, y = _draw(5, torch.float64)(10, IN), _draw(6, torch.float64)(10, OUT)
    work = table.work("site", plan, torch.device("cpu"))
    assert work is not None
    source = {Phase.INPUT: x, Phase.MAP: y, Phase.ADD: x}[kind.phase]
    expected = (x if kind.phase is Phase.INPUT else y).clone()
    for segment in plan.segments:
        at = slice(segment.start, segment.stop)
        expected[at] += segment.scale * ops[segment.handle].reference(source[at])
    changed = y.clone()
    work.change_output(changed, x)
    got = work.change_input(x) if kind.phase is Phase.INPUT else changed
    torch.testing.assert_close(got, expected, atol=1e-9, rtol=1e-9)
    for row in (0, 9):
        assert torch.equal(got[row], (x if kind.phase is Phase.INPUT else y)[row])

"""Steps whose inputs are made in a cheap way, held against the plain one."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import fields
from typing import Any

import numpy as np
import torch

from onebase.serve.engine.chunk import Chunk
from onebase.serve.engine.decode_rows import DecodeRows
from onebase.serve.engine.inputs import StepInputs, sampled_rows


def hold_twins(runner: Any) -> list[bool]:
    """From now on every step of decodes is checked; a list that grows by one for each: whether it followed another."""
    following, held = runner._following, list[bool]()

    def checked(chunks: Rows[Chunk]) -> DecodeRows | None:
        before = runner._decodes
        decodes: DecodeRows | None = following(chunks)
        if decodes is not None:
            held.append(decodes is before)
            runs = [run for chunk in chunks for run in chunk.sequence.runs(chunk.start, chunk.stop)]
            assert decodes.runs == runs
            found = decodes.inputs(None, chunks)
            _assert_equal(found, runner._inputs(chunks, sampled_rows(chunks), runs, None))
        return decodes

    runner._following = checked
    return held


def _assert_equal(found: StepInputs, plain: StepInputs) -> None:
    for name in ("ids", "positions", "logits_rows"):
        assert torch.equal(getattr(found, name), getattr(plain, name)), name
    assert (found.virtual, found.rows, found.logits) == (plain.virtual, plain.rows, plain.logits)
    for field in fields(found.attention):
        mine, theirs = getattr(found.attention, field.name), getattr(plain.attention, field.name)
        if isinstance(mine, torch.Tensor):
            assert torch.equal(mine, theirs), field.name
        elif isinstance(mine, np.ndarray):
            assert np.array_equal(mine, theirs), field.name
        else:
            assert mine == theirs, field.name

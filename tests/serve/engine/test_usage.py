"""What is measured at the start: the host or its container, the weights, the largest step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from onebase.serve.engine import usage
from onebase.serve.engine.config import EngineConfig
from onebase.serve.engine.host_memory import HostMemory
from onebase.serve.engine.tensor_peak import TensorPeak
from onebase.serve.engine.usage import measure, weight_bytes
from onebase.serve.model.loader import LoadedModel, load_model

MIB = 1 << 20


@pytest.mark.parametrize("version", [1, 2])
def test_a_containers_limit_counts_and_its_file_cache_is_free(version: int, tmp_path: Path) -> None:
    folder = tmp_path / "memory" if version == 1 else tmp_path
    folder.mkdir(exist_ok=True)
    names = ("limit_in_bytes", "usage_in_bytes") if version == 1 else ("max", "current")
    idle = "total_inactive_file" if version == 1 else "inactive_file"
    for name, text in zip((*names, "stat"), (64 * MIB, 50 * MIB, f"anon 5\n{idle} {20 * MIB}\n"), strict=True):
        (folder / f"memory.{name}").write_text(f"{text}\n")
    assert HostMemory.now(tmp_path) == HostMemory(64 * MIB, 34 * MIB)


def test_without_a_limit_the_host_counts(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("5\n")
    (tmp_path / "memory.stat").write_text("")
    assert HostMemory.now(tmp_path).total == HostMemory.now(tmp_path / "nowhere").total > MIB


def test_the_peak_of_tensors_is_that_of_a_straight_count() -> None:
    """Views, changes in place and what came from outside add nothing; what is let go is no longer there."""
    given = torch.ones(MIB)
    with TensorPeak() as tensors:
        first = given * 2
        second = first.view(2, -1).t().contiguous()
        del first
        second.add_(1)
        third = second[:10] + given[:20].view(10, 2)
        del second
    assert tensors.most == 8 * MIB
    assert tensors.live == third.untyped_storage().nbytes()


def _loaded(checkpoint: Callable[[str], Path], architecture: str) -> tuple[EngineConfig, LoadedModel]:
    config = EngineConfig(str(checkpoint(architecture)), dtype="float32", device="cpu", max_batch_tokens=128)
    return config, load_model(config)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_weights_count_once_however_they_lie(architecture: str, checkpoint: Any) -> None:
    """Packed ones included; gpt2's head is its embedding."""
    _, base = _loaded(checkpoint, architecture)
    stored = sum(parameter.numel() * 4 for parameter in base.model.parameters())
    assert stored <= weight_bytes(base) <= 1.05 * stored


def test_the_step_is_in_proportion_to_its_rows(checkpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 128 rows 16 are run. The peak is at least the widest module's output, and at most a few dozen vectors."""
    config, base = _loaded(checkpoint, "llama")
    monkeypatch.setattr(usage, "_ROWS_CPU", range(16, 128))
    whole = measure(config, base).step
    assert 128 * 96 * 4 < whole < 128 * 128 * 4 * 40
    monkeypatch.setattr(usage, "_WORK_CPU", 0.0)
    ran: list[tuple[int, int]] = []
    run = usage._run_step
    monkeypatch.setattr(usage, "_run_step", lambda *args: [ran.append(args[2:]), run(*args)])
    assert 0.7 * whole < measure(config, base).step < 1.5 * whole
    assert ran == [(16, 1), (16, 16)]


def test_many_draws_over_a_large_vocabulary_are_the_peak(checkpoint: Any) -> None:
    """They do not grow with the tokens of a batch."""
    config, base = _loaded(checkpoint, "llama")
    base.model.lm_head.forward = lambda x: torch.zeros(*x.shape[:-1], 20_000)
    few, many = (measure(replace(config, max_num_seqs=n), base).step for n in (8, 64))
    assert 5 < many / few < 12
    assert measure(replace(config, max_num_seqs=64, max_batch_tokens=1024), base).step == many


def test_measuring_leaves_nothing_behind(checkpoint: Any) -> None:
    config, base = _loaded(checkpoint, "mistral")
    found = measure(config, base)
    assert base.context.batch is None
    assert found.adapted == 128 * 96 * 8
    assert found.libraries == 0
    assert found.weights == weight_bytes(base)

"""Pickled adapters become safetensors in a process of their own; whatever else a pickle holds is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from onebase.adapters.convert import convert
from onebase.adapters.errors import AdapterRejected
from onebase.adapters.unpickle import Unusable, _checked
from onebase.serve.cli import app

LIMIT = 1 << 24
KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def folder(path: Path, state: object, name: str = "adapter_model.bin", **config: Any) -> Path:
    path.mkdir()
    torch.save(state, path / name)
    (path / "adapter_config.json").write_text(json.dumps(config or {"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    return path


def test_the_command_writes_what_was_pickled(tmp_path: Path) -> None:
    """Also views, transposed tensors, parameters, and a head beside."""
    whole = torch.randn(6, 8)
    state = {KEY: whole[2:4], "b": whole.T, "c": torch.nn.Parameter(whole.bfloat16()), "d": torch.arange(5)}
    source = folder(tmp_path / "source", state, "pytorch_adapter.bin", config={"architecture": "lora"})
    torch.save({"lm_head.weight": whole}, source / "pytorch_model_head.bin")
    (source / "README.md").write_text("left behind")
    done = CliRunner().invoke(app, ["adapters", "convert", str(source), str(tmp_path / "deep" / "target")])
    assert done.exit_code == 0, done.output
    assert "AH_LORA, 5 tensors" in done.output
    target = tmp_path / "deep" / "target"
    assert {file.name for file in target.iterdir()} == {
        "adapter_config.json",
        "adapter.safetensors",
        "model_head.safetensors",
    }
    written = load_file(target / "adapter.safetensors")
    assert written.keys() == state.keys()
    for key, tensor in state.items():
        assert written[key].dtype == tensor.dtype
        assert torch.equal(written[key], tensor)
    assert json.loads((target / "adapter_config.json").read_text()) == {"config": {"architecture": "lora"}}
    assert [file.name for file in target.parent.iterdir()] == ["target"]


class Evil:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.canary),)


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "code": (lambda canary: {"a": Evil(canary)}, "no pickle of tensors alone"),
    "empty": (lambda canary: {}, "is empty: a file of about 443 bytes"),
    "larger than it looks": (lambda canary: {"a": torch.zeros(1).expand(1 << 31)}, "more memory"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_the_process_refuses(case: str, tmp_path: Path) -> None:
    make, message = BROKEN[case]
    canary = tmp_path / "canary"
    source = folder(tmp_path / "source", make(canary))
    done = CliRunner().invoke(app, ["adapters", "convert", str(source), str(tmp_path / "target")])
    assert done.exit_code == 1
    assert "'adapter_model.bin' is refused" in done.output
    assert message in done.output
    assert {file.name for file in tmp_path.iterdir()} == {"source"}


STATES: dict[str, tuple[object, str]] = {
    "a list": ([torch.zeros(1)], "a list, not a table"),
    "nested": ({"state_dict": {"a": torch.zeros(1)}}, "'state_dict' is a dict"),
    "a number": ({"a": 1.0}, "'a' is a float"),
    "a key that is no string": ({1: torch.zeros(1)}, "key 1 is no"),
    "an unprintable key": ({"a\n": torch.zeros(1)}, "is no tensor's name"),
    "sparse": ({"a": torch.eye(2).to_sparse()}, "sparse_coo"),
    "complex": ({"a": torch.zeros(1, dtype=torch.complex64)}, "complex64"),
    "on no device": ({"a": torch.zeros(1, device="meta")}, "safetensors cannot hold"),
    "over the limit": ({"a": torch.zeros(1).expand(LIMIT)}, "at most 16777216"),
}


@pytest.mark.parametrize("case", STATES)
def test_what_is_no_table_of_tensors(case: str) -> None:
    state, message = STATES[case]
    with pytest.raises(Unusable, match=message):
        _checked(state, LIMIT)


def test_copies_of_a_prefix_are_dropped_and_other_shared_tensors_kept() -> None:
    one, other = torch.randn(4), torch.randn(4)
    pool = "model.layers.{}.self_attn.prefix_tuning.pool.prefix_tunings.x.control_trans"
    state: dict[str, Tensor] = {pool.format(0): one, pool.format(1): one, "model.prefix_tuning.prefix_tunings.x": one}
    assert _checked(state, LIMIT).keys() == {"model.prefix_tuning.prefix_tunings.x"}
    assert _checked({pool.format(0): one, pool.format(1): one, pool.format(2): other}, LIMIT).keys() == {
        pool.format(0),
        pool.format(2),
    }
    assert _checked({"embed": one, "head": one}, LIMIT).keys() == {"embed", "head"}


def test_folders_that_are_refused_before_anything_is_opened(tmp_path: Path) -> None:
    source = folder(tmp_path / "source", {"a": torch.zeros(1)})
    (tmp_path / "there").mkdir()
    with pytest.raises(AdapterRejected, match="exists"):
        convert(source, tmp_path / "there")
    (tmp_path / "link").symlink_to(source)
    with pytest.raises(AdapterRejected, match="not a folder"):
        convert(tmp_path / "link", tmp_path / "target")
    (source / "adapter_fusion_config.json").write_text("{}")
    with pytest.raises(AdapterRejected, match="AdapterFusion"):
        convert(source, tmp_path / "target")
    (source / "adapter_fusion_config.json").unlink()
    (source / "adapter_model.bin").rename(source / "adapter_model.pt")
    with pytest.raises(AdapterRejected, match="no weights to convert"):
        convert(source, tmp_path / "target")
    (source / "adapter_model.bin").symlink_to(source / "adapter_model.pt")
    with pytest.raises(AdapterRejected, match="regular file"):
        convert(source, tmp_path / "target")
    (source / "adapter_model.bin").unlink()
    (source / "adapter_model.pt").rename(source / "adapter_model.bin")
    (source / "adapter_config.json").write_text("{}")
    with pytest.raises(AdapterRejected, match="peft_type"):
        convert(source, tmp_path / "target")

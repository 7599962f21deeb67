"""PARTIAL and LLM-Adapters' BOTTLENECK: broken, hostile or unserved files are refused by name."""

from __future__ import annotations

import copy
import json
import pathlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from onebase.adapters.errors import AdapterRejected
from onebase.adapters.formats import compile_folder
from onebase.adapters.program import AdapterProgram
from onebase.kernels.ops.dense import Dense, OutputRows
from onebase.kernels.ops.sparse import Sparse

from .conftest import TinyBase

DOCUMENT = Path(__file__).parents[2] / "docs/partial.md"
Q0 = "model.layers.0.self_attn.q_proj"
PARTIAL = {"peft_type": "PARTIAL", "mode": "add"}
BOTTLENECK = {"peft_type": "BOTTLENECK", "bottleneck_size": 2, "non_linearity": "tanh", "scaling": 1.0}


def compiled(folder: Path, model: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor]) -> AdapterProgram:
    save_file(tensors, folder / "adapter.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    return compile_folder(folder, TinyBase(model), "d")


def entries(indices: list[int], dtype: torch.dtype = torch.int64) -> dict[str, Tensor]:
    return {
        f"{Q0}.weight.indices": torch.tensor(indices, dtype=dtype),
        f"{Q0}.weight.values": torch.ones(len(indices)),
    }


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Tensor], str]] = {
    "mode missing": ({"mode": ...}, entries([1]), "'mode'"),
    "mode": ({"mode": "subtract"}, entries([1]), "'mode'.*'replace' or 'add'"),
    "unknown": ({"magic": 1}, entries([1]), "magic"),
    "shape": ({}, {f"{Q0}.weight": torch.ones(32, 31)}, r"\(32, 31\)"),
    "shape of a bias": ({}, {f"{Q0}.bias": torch.ones(31)}, r"\(31,\)"),
    "no such module": ({}, {"model.layers.9.q_proj.weight": torch.ones(1)}, "no such module"),
    "no bias in the base": ({}, {"lm_head.bias": torch.ones(64)}, "lm_head of the base has none"),
    "out of bounds": ({}, entries([0, 1024]), "outside 0 to 1023"),
    "negative": ({}, entries([-1]), "outside 0 to 1023"),
    "twice": ({}, entries([5, 9, 5]), "names a place twice"),
    "booleans": ({}, entries([1, 0], torch.bool), "dtype"),
    "halves": ({}, {f"{Q0}.weight.values": torch.ones(1)}, "not half"),
    "both ways": ({}, entries([1]) | {f"{Q0}.weight": torch.ones(32, 32)}, "not in both ways"),
    "more values": ({}, entries([1, 2]) | {f"{Q0}.weight.values": torch.ones(3)}, r"indices.*\(2,\)"),
    "values of two dimensions": ({}, entries([1, 2]) | {f"{Q0}.weight.values": torch.ones(2, 1)}, "one dimension"),
    "something else": ({}, entries([1]) | {f"{Q0}.gain": torch.ones(3)}, "has no meaning"),
    "nothing": ({}, {f"{Q0}.weight": torch.zeros(32, 32)}, "would change nothing"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_partial_refusals(case: str, tmp_path: Path, llama: nn.Module) -> None:
    changes, tensors, message = REFUSED[case]
    with pytest.raises(AdapterRejected, match=message):
        compiled(tmp_path, llama, PARTIAL | changes, tensors)


def test_a_change_takes_its_smallest_form(tmp_path: Path, llama: nn.Module) -> None:
    few, rows, all_rows = (torch.zeros(32, 32) for _ in range(3))
    few[3, 7] = few[30, 1] = 1.0
    rows[[2, 5, 8, 11, 14]] = 0.5
    all_rows[:, ::2] = 0.25
    for change, kind in ((few, Sparse), (rows, OutputRows), (all_rows, Dense)):
        (op,) = compiled(tmp_path, llama, PARTIAL, {f"{Q0}.weight": change}).ops[Q0].extra
        assert type(op) is kind
        x = torch.randn(3, 32)
        torch.testing.assert_close(op.reference(x).float(), x @ change.T)


def test_a_replaced_copy_of_the_base_changes_nothing(tmp_path: Path, llama: nn.Module) -> None:
    tensors = {f"{Q0}.weight": llama.get_submodule(Q0).weight.clone(), "model.norm.weight": torch.ones(32)}
    program = compiled(tmp_path, llama, PARTIAL | {"mode": "replace"}, tensors)
    assert program.ops.keys() == {"model.norm"}


def bottleneck(path: str = "model.layers.0.mlp.down_proj", width: int = 32, out: int = 32) -> dict[str, Tensor]:
    prefix = f"base_model.model.{path}"
    return {
        f"{prefix}.adapter_down.weight": torch.ones(2, width),
        f"{prefix}.adapter_up.weight": torch.ones(out, 2),
    }


WITHOUT_UP = {key: tensor for key, tensor in bottleneck().items() if "up" not in key}
BOTTLENECKS: dict[str, tuple[dict[str, Any], Callable[[], dict[str, Tensor]], str]] = {
    "size": ({"bottleneck_size": 3}, bottleneck, r"\(2, 32\).*\(3, 32\)"),
    "size missing": ({"bottleneck_size": ...}, bottleneck, "no bottleneck_size"),
    "activation": ({"non_linearity": "softsign"}, bottleneck, "non_linearity"),
    "scaling": ({"scaling": "often"}, bottleneck, "scaling"),
    "no learned scaling": ({"scaling": "learned"}, bottleneck, "adapter_scaling"),
    "half": ({}, lambda: WITHOUT_UP, "adapter_up"),
    "bias field": ({"bias": "some"}, bottleneck, "'bias'"),
    "saved modules": ({"modules_to_save": ["lm_head"]}, bottleneck, "modules_to_save"),
    "no place in series": ({}, lambda: bottleneck(Q0), "q_proj.*no place.*llama"),
    "bias under an output adapter": (
        {"bias": "all"},
        lambda: bottleneck() | {"base_model.model.model.layers.0.mlp.down_proj.bias": torch.ones(32)},
        "reads its output, and another bias",
    ),
    "beside an embedding": (
        {"use_parallel_adapter": True},
        lambda: bottleneck("model.embed_tokens", 64),
        "embed_tokens, which is no linear module",
    ),
    "unknown": ({"adapter_gate": True}, bottleneck, "adapter_gate"),
}


@pytest.mark.parametrize("case", BOTTLENECKS)
def test_bottleneck_refusals(case: str, tmp_path: Path, llama: nn.Module) -> None:
    changes, tensors, message = BOTTLENECKS[case]
    with pytest.raises(AdapterRejected, match=message):
        compiled(tmp_path, llama, BOTTLENECK | changes, tensors())


def test_the_lines_in_the_documentation_write_adapters(
    tmp_path: Path, llama: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both of them say the same change: a bias whole, and by its entries."""
    monkeypatch.chdir(tmp_path)
    whole, single = re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    model = copy.deepcopy(llama)
    bias = model.get_submodule(Q0).bias.requires_grad_(True)
    names = {"model": model, "before": {n: p.detach().clone() for n, p in model.named_parameters()}}
    bias.data[3] += 0.5
    scope: dict[str, Any] = {"pathlib": pathlib, "safetensors": safetensors, **names}
    for lines in (whole, single):
        exec(lines, scope)
        program = compile_folder(tmp_path / "my-adapter", TinyBase(llama), "d")
        assert program.ops.keys() == {Q0}
        added = program.ops[Q0].add_out
        assert added is not None
        torch.testing.assert_close(added, torch.eye(32)[3] * 0.5)

"""AdapterHub's ReFT folders: what they compile to, and which are refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from onebase.adapters.base import Layer, Site, SiteKind
from onebase.adapters.errors import AdapterRejected
from onebase.adapters.formats import compile_folder
from onebase.adapters.program import AdapterProgram, Window
from onebase.adapters.traits import Traits
from onebase.kernels.ops.reft import Intervention

from .conftest import TinyBase

WIDTH, R = 32, 4
AT = "model.layers.0.reft_layer.refts.task.units.0"
WEIGHT = f"{AT}.projection.weight"
LOREFT: dict[str, Any] = {
    "architecture": "reft",
    "dropout": 0.05,
    "layers": "all",
    "non_linearity": None,
    "orthogonality": True,
    "output_reft": True,
    "prefix_positions": 3,
    "r": R,
    "suffix_positions": 0,
    "tied_weights": False,
}
NOREFT = LOREFT | {"orthogonality": False, "suffix_positions": 2}


class LayeredBase(TinyBase):
    """With the decoder layers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        paths = [f"model.layers.{index}" for index in range(2)]
        self.sites |= {path: Site(path, SiteKind.LAYER, WIDTH, WIDTH) for path in paths}
        self.layers = [Layer(f"{p}.self_attn", None, 4, 4, 8, 8**-0.5, p) for p in paths]


def tensors_of(config: dict[str, Any]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for layer in range(2):
        for unit in range(2):
            prefix = f"model.layers.{layer}.reft_layer.refts.task.units.{unit}"
            tensors |= {f"{prefix}.learned_source.weight": torch.randn(R, WIDTH)}
            tensors |= {f"{prefix}.learned_source.bias": torch.randn(R)}
            if config["orthogonality"]:
                at = f"{prefix}.projection.parametrizations.weight"
                tensors |= {f"{at}.original": torch.randn(R, WIDTH).triu(1) - torch.eye(R, WIDTH)}
                tensors |= {f"{at}.0.base": torch.linalg.qr(torch.randn(WIDTH, WIDTH)).Q.contiguous()}
            else:
                tensors |= {f"{prefix}.projection.weight": torch.randn(R, WIDTH)}
    return tensors


@pytest.fixture
def compiled(tmp_path: Path, llama: nn.Module) -> Callable[..., AdapterProgram]:
    """compiled(config, changes of it, change of the tensors); ``...`` removes a field."""

    def run(config: dict[str, Any], fields: dict[str, Any] | None = None, edit: Any = None) -> AdapterProgram:
        tensors = tensors_of(config)
        if edit is not None:
            edit(tensors)
        inner = {key: value for key, value in (config | (fields or {})).items() if value is not ...}
        whole = {"config": inner, "name": "task", "version": "adapters.1.2.0", "model_type": "llama"}
        (tmp_path / "adapter_config.json").write_text(json.dumps(whole))
        save_file(tensors, tmp_path / "adapter.safetensors")
        return compile_folder(tmp_path, LayeredBase(llama), "d")

    return run


def _ops(program: AdapterProgram, layer: int = 0) -> list[Intervention]:
    found = program.ops[f"model.layers.{layer}"].extra
    return [op for op in found if isinstance(op, Intervention)]


def test_a_unit_for_each_end_that_has_positions(compiled: Callable[..., AdapterProgram]) -> None:
    both = compiled(NOREFT)
    assert [op.part for op in _ops(both)] == ["first", "last"]
    assert both.window == Traits.of(both).window == Window(3, 2, shortest=2)
    assert both.scalable
    one = compiled(LOREFT)
    assert ([op.part for op in _ops(one)], one.window) == (["first"], Window(3, 0, shortest=0))
    last = compiled(NOREFT, {"prefix_positions": 0})
    assert ([op.part for op in _ops(last)], last.window) == (["last"], Window(0, 2))
    gelu = compiled(NOREFT, {"non_linearity": "gelu"})
    assert (_ops(gelu)[0].subtracts, gelu.scalable) == (True, False)


def test_tied_weights_are_one_unit(compiled: Callable[..., AdapterProgram]) -> None:
    def drop(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if ".units.1." in key]:
            del tensors[key]

    assert [op.part for op in _ops(compiled(NOREFT, {"tied_weights": True}, drop))] == ["both"]


def test_the_rows_of_loreft_are_orthonormal(compiled: Callable[..., AdapterProgram]) -> None:
    projection = _ops(compiled(LOREFT))[0].projection
    torch.testing.assert_close(projection @ projection.T, torch.eye(R), atol=1e-5, rtol=0)


def test_chosen_layers(compiled: Callable[..., AdapterProgram]) -> None:
    def drop(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if ".layers.0." in key]:
            del tensors[key]

    assert compiled(LOREFT, {"layers": [1]}, drop).ops.keys() == {"model.layers.1"}


FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "nowhere": ({"prefix_positions": 0, "suffix_positions": 0}, "prefix_positions.*acts nowhere"),
    "negative": ({"prefix_positions": -1}, "prefix_positions"),
    "huge": ({"suffix_positions": 1 << 40}, "suffix_positions"),
    "no positions": ({"prefix_positions": ...}, "no prefix_positions"),
    "positions of a string": ({"prefix_positions": "f7+l7"}, "prefix_positions.*integer"),
    "rank": ({"r": 3}, r"learned_source.*\(4, 32\).*\(3, 32\)"),
    "rank huge": ({"r": 1 << 20}, "'r'"),
    "no rank": ({"r": ...}, "no r"),
    "no output": ({"output_reft": False}, "output_reft.*nowhere"),
    "layers of a string": ({"layers": "last"}, "layers.*'all' or a list"),
    "layers of strings": ({"layers": ["1"]}, "layers.*'all' or a list"),
    "no layers": ({"layers": []}, "layers.*'all' or a list"),
    "layer out of range": ({"layers": [0, 1, 2]}, "adapts layer 2, and the base has no such layer"),
    "layer below": ({"layers": [-1]}, "adapts layer -1, and the base has no such layer"),
    "fewer layers": ({"layers": [1]}, "no meaning"),
    "orthogonal": ({"orthogonality": True}, "parametrizations.weight.original"),
    "tied": ({"tied_weights": True}, "no meaning"),
    "activation": ({"non_linearity": "mish"}, "non_linearity.*mish"),
    "subtracts": ({"subtract_projection": "no"}, "subtract_projection"),
    "unknown": ({"intervene_on_prompt": True}, "intervene_on_prompt"),
}


@pytest.mark.parametrize("case", FIELDS)
def test_config_fields(case: str, compiled: Callable[..., AdapterProgram]) -> None:
    fields, message = FIELDS[case]
    with pytest.raises(AdapterRejected, match=message):
        compiled(NOREFT, fields)


TENSORS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "half": (lambda t: t.pop(WEIGHT), "projection.weight.*half an adapter"),
    "no second unit": (
        lambda t: [t.pop(key) for key in list(t) if ".layers.0." in key and ".units.1." in key],
        "units.1.*half an adapter",
    ),
    "no layer": (lambda t: [t.pop(key) for key in list(t) if ".layers.1." in key], "layer 1, and no tensor"),
    "third unit": (lambda t: t.update({WEIGHT.replace("units.0", "units.2"): torch.ones(R, WIDTH)}), "no meaning"),
    "no such layer": (
        lambda t: t.update({WEIGHT.replace("layers.0", "layers.7"): torch.ones(R, WIDTH)}),
        "layers.7.*no such layer",
    ),
    "two spellings": (
        lambda t: t.update({WEIGHT.removeprefix("model."): torch.ones(R, WIDTH)}),
        "adapts layer 0, and others do so too",
    ),
    "width": (lambda t: t.update({WEIGHT: torch.ones(R, WIDTH + 1)}), r"projection.weight.*\(4, 33\).*\(4, 32\)"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors(case: str, compiled: Callable[..., AdapterProgram]) -> None:
    edit, message = TENSORS[case]
    with pytest.raises(AdapterRejected, match=message):
        compiled(NOREFT, edit=edit)


def test_a_base_of_another_shape_is_refused(compiled: Callable[..., AdapterProgram]) -> None:
    key = f"{AT}.projection.parametrizations.weight.0.base"
    with pytest.raises(AdapterRejected, match=r"base.*\(4, 4\).*\(32, 32\)"):
        compiled(LOREFT, edit=lambda t: t.update({key: torch.eye(4)}))


def test_it_is_no_part_of_a_union(compiled: Callable[..., AdapterProgram]) -> None:
    union = {"architecture": "union", "configs": [NOREFT]} | dict.fromkeys(LOREFT.keys() - {"architecture"}, ...)
    with pytest.raises(AdapterRejected, match=r"architecture.*one request together"):
        compiled(NOREFT, union)

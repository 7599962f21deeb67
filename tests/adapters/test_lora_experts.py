"""LoRA on stacked expert weights: what is refused, and by what name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

from onebase.adapters.base import ExpertParameter, Experts, Site, SiteKind
from onebase.adapters.errors import AdapterRejected
from onebase.adapters.formats import compile_folder
from onebase.kernels.ops.experts import ExpertLowRank, RouterLowRank

from .conftest import TinyBase, edit_config, edit_tensors

RANK, EXPERTS, WIDTH, INNER = 3, 4, 32, 24
PATH = "model.layers.0.mlp.experts"
KEY = f"base_model.model.{PATH}"
GATE = "base_model.model.model.layers.0.mlp.gate"


@pytest.fixture(scope="module")
def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=EXPERTS, num_experts_per_tok=2,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config)


@pytest.fixture
def base(mixtral: nn.Module) -> TinyBase:
    """What the probe finds, written out."""
    base: Any = TinyBase(mixtral)
    up, down = ExpertParameter("gate_up_proj", WIDTH, 2 * INNER), ExpertParameter("down_proj", INNER, WIDTH)
    base.experts = {PATH: Experts(EXPERTS, 2, up, down, ("gate_up_proj", "down_proj"))}
    base.sites[PATH] = Site(PATH, SiteKind.EXPERTS, WIDTH, WIDTH)
    gate = PATH.replace("experts", "gate")
    base.sites[gate] = Site(gate, SiteKind.ROUTER, WIDTH, EXPERTS)
    return base


@pytest.fixture
def adapter(mixtral: nn.Module, tmp_path: Path) -> Path:
    names = ["experts.gate_up_proj", "experts.down_proj", "mlp.gate.weight"]
    config = peft.LoraConfig(r=RANK, lora_alpha=6, target_modules=[], target_parameters=names)
    model = peft.get_peft_model(copy.deepcopy(mixtral), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    return tmp_path


def test_factors_are_those_of_peft(adapter: Path, base: TinyBase, mixtral: nn.Module) -> None:
    """Each expert's B A, against the difference that PEFT merges into the parameter."""
    extra = {path: ops.extra for path, ops in compile_folder(adapter, base, "d").ops.items()}
    merged = peft.PeftModel.from_pretrained(copy.deepcopy(mixtral), adapter).merge_and_unload()
    for op in extra[PATH]:
        assert isinstance(op, ExpertLowRank)
        change = merged.get_parameter(f"{PATH}.{op.parameter}") - mixtral.get_parameter(f"{PATH}.{op.parameter}")
        for expert in range(EXPERTS):
            mine = op.factor * op.b[expert].T @ op.a[expert]
            torch.testing.assert_close(mine, change[expert], atol=1e-5, rtol=1e-4)
    (router,) = extra[PATH.replace("experts", "gate")]
    assert isinstance(router, RouterLowRank)
    name = PATH.replace("experts", "gate.weight")
    torch.testing.assert_close(
        router.matrix(), merged.get_parameter(name) - mixtral.get_parameter(name), atol=1e-5, rtol=1e-4
    )


TENSORS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "A without B": (lambda t: t.pop(f"{KEY}.lora_B.weight"), r"experts\.down_proj has only .*lora_A"),
    "one parameter is missing": (
        lambda t: [t.pop(f"{KEY}.base_layer.lora_{part}.weight") for part in "AB"],
        r"for 1 parameters.*names 2",
    ),
    "no parameter is there": (
        lambda t: [t.pop(key) for key in list(t) if KEY in key],
        r"for 0 parameters.*gate_up_proj, down_proj",
    ),
    "a third parameter": (
        lambda t: t.update({f"{KEY}.base_layer.base_layer.lora_A.weight": torch.ones(3, 3)}),
        r"for 3 parameters",
    ),
    "rank": (lambda t: t.update({f"{KEY}.lora_A.weight": torch.ones(8, INNER)}), r"\(8, 24\).*\(12, 24\).*rank 3"),
    "experts": (lambda t: t.update({f"{KEY}.lora_B.weight": torch.ones(WIDTH, 15)}), r"\(32, 15\).*\(32, 12\)"),
    "three dimensions": (lambda t: t.update({f"{KEY}.lora_A.weight": torch.ones(4, 3, INNER)}), r"\(4, 3, 24\)"),
    "router's experts": (lambda t: t.update({f"{GATE}.lora_B.weight": torch.ones(5, 3)}), r"\(5, 3\).*\(4, 3\)"),
    "same twice": (
        lambda t: t.update({f"{KEY}.lora_A.default.weight": torch.ones(12, INNER)}),
        "mean the same",
    ),
    "a bias": (lambda t: t.update({f"{KEY}.lora_B.bias": torch.ones(WIDTH)}), r"lora_B\.bias"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors(case: str, adapter: Path, base: TinyBase) -> None:
    change, message = TENSORS[case]
    edit_tensors(adapter, change)
    with pytest.raises(AdapterRejected, match=message):
        compile_folder(adapter, base, "d")


FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "not named": ({"target_parameters": None}, r"mlp\.\w+ has LoRA tensors for \d parameters.*names 0"),
    "text": ({"target_parameters": "experts.down_proj"}, "target_parameters"),
    "numbers": ({"target_parameters": [1]}, "target_parameters"),
    "rank by pattern": ({"rank_pattern": {"experts.down_proj": 5}}, r"\(12, 24\).*\(20, 24\).*rank 5"),
}


@pytest.mark.parametrize("case", FIELDS)
def test_fields(case: str, adapter: Path, base: TinyBase) -> None:
    changes, message = FIELDS[case]
    edit_config(adapter, **changes)
    with pytest.raises(AdapterRejected, match=message):
        compile_folder(adapter, base, "d")


def test_other_parameters_of_experts_are_refused_by_name(adapter: Path, base: TinyBase) -> None:
    known: Any = base.experts[PATH]
    base.experts = {PATH: Experts(EXPERTS, 2, known.up, known.down, ("gate_up_proj", "down_proj", "down_proj_bias"))}
    names = ["experts.gate_up_proj", "experts.down_proj_bias", "mlp.gate.weight"]
    edit_config(adapter, target_parameters=names)
    with pytest.raises(AdapterRejected, match=r"down_proj_bias.*gate_up_proj and down_proj are served"):
        compile_folder(adapter, base, "d")


def test_experts_that_the_base_refuses_say_why(adapter: Path, base: TinyBase) -> None:
    del base.sites[PATH]
    base.experts, base.refused = {}, {PATH: "its experts compute something of their own"}
    with pytest.raises(AdapterRejected, match="something of their own"):
        compile_folder(adapter, base, "d")

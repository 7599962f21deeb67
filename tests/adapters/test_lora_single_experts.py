"""LoRA files with factors for each expert alone: fused exactly, or refused by the key that is missing or too much."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from onebase.adapters.base import ExpertParameter, Experts, Site, SiteKind
from onebase.adapters.errors import AdapterRejected
from onebase.adapters.formats import compile_folder
from onebase.kernels.ops.experts import ExpertLowRank

from .conftest import TinyBase, edit_config, edit_tensors

EXPERTS, WIDTH, INNER, RANK = 3, 16, 8, 2
PATH = "model.layers.0.mlp.experts"
OLD = "base_model.model.model.layers.0.block_sparse_moe.experts"
SHAPES = {"w1": (WIDTH, INNER), "w3": (WIDTH, INNER), "w2": (INNER, WIDTH)}


@pytest.fixture
def base() -> TinyBase:
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=EXPERTS, num_experts_per_tok=2,
    )  # fmt: skip
    base: Any = TinyBase(transformers.AutoModelForCausalLM.from_config(config))
    up, down = ExpertParameter("gate_up_proj", WIDTH, 2 * INNER), ExpertParameter("down_proj", INNER, WIDTH)
    base.experts = {PATH: Experts(EXPERTS, 2, up, down, ("gate_up_proj", "down_proj"))}
    base.sites[PATH] = Site(PATH, SiteKind.EXPERTS, WIDTH, WIDTH)
    return base


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    tensors = {
        f"{OLD}.{expert}.{name}.lora_{part}.weight": torch.randn((RANK, width) if part == "A" else (out, RANK))
        for expert in range(EXPERTS)
        for name, (width, out) in SHAPES.items()
        for part in "AB"
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 6, "target_modules": ["w1", "w2", "w3"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    return tmp_path


def test_experts_are_fused(adapter: Path, base: TinyBase) -> None:
    """Alpha differs between gate and up, as a pattern has it: every half keeps its own scale."""
    edit_config(adapter, alpha_pattern={"w1": 1})
    tensors: dict[str, Tensor] = {}
    edit_tensors(adapter, tensors.update)
    ops = {op.parameter: op for op in compile_folder(adapter, base, "d").ops[PATH].extra}  # type: ignore[attr-defined]
    assert isinstance(ops["gate_up_proj"], ExpertLowRank)
    for expert in range(EXPERTS):
        change = {
            name: tensors[f"{OLD}.{expert}.{name}.lora_B.weight"] @ tensors[f"{OLD}.{expert}.{name}.lora_A.weight"]
            for name in SHAPES
        }
        expected = {"gate_up_proj": torch.cat([change["w1"] / 2, change["w3"] * 3]), "down_proj": change["w2"] * 3}
        for name, op in ops.items():
            torch.testing.assert_close(op.factor * op.b[expert].T @ op.a[expert], expected[name])


TENSORS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "an expert is missing": (
        lambda t: [t.pop(f"{OLD}.1.w2.lora_{part}.weight") for part in "AB"],
        r"no lora_A of expert 1's down projection",
    ),
    "B is missing": (lambda t: t.pop(f"{OLD}.2.w1.lora_B.weight"), r"no lora_B of expert 2's gate projection"),
    "gate without up": (
        lambda t: [t.pop(key) for key in list(t) if ".w3." in key],
        r"no lora_A of expert 0's up projection",
    ),
    "an expert too many": (
        lambda t: t.update({f"{OLD}.3.w2.lora_A.weight": torch.ones(RANK, INNER)}),
        r"3 experts.*experts\.3\.w2",
    ),
    "an endless expert": (
        lambda t: t.update({f"{OLD}.{'9' * 900}.w2.lora_A.weight": torch.ones(RANK, INNER)}),
        "no such module",
    ),
    "rank": (lambda t: t.update({f"{OLD}.0.w1.lora_A.weight": torch.ones(3, WIDTH)}), r"\(3, 16\).*\(2, 16\).*rank 2"),
    "stacked ones too": (
        lambda t: t.update({f"base_model.model.{PATH}.lora_A.weight": torch.ones(6, INNER)}),
        r"for 1 parameters.*names 0",
    ),
    "a bias": (lambda t: t.update({f"{OLD}.0.w1.lora_B.bias": torch.ones(INNER)}), r"lora_B\.bias"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors(case: str, adapter: Path, base: TinyBase) -> None:
    change, message = TENSORS[case]
    edit_tensors(adapter, change)
    with pytest.raises(AdapterRejected, match=message):
        compile_folder(adapter, base, "d")


FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "rslora": ({"use_rslora": True}, "use_rslora.*single experts"),
    "rank by expert": ({"rank_pattern": {"experts.1.w1": 5}}, "rank_pattern.*one rank"),
    "alpha by expert": ({"alpha_pattern": {"experts.1.w1": 5}}, "one rank and one alpha"),
}


@pytest.mark.parametrize("case", FIELDS)
def test_fields(case: str, adapter: Path, base: TinyBase) -> None:
    changes, message = FIELDS[case]
    edit_config(adapter, **changes)
    with pytest.raises(AdapterRejected, match=message):
        compile_folder(adapter, base, "d")


def test_experts_that_take_turns_have_no_halves(adapter: Path, base: TinyBase) -> None:
    known: Any = base.experts[PATH]
    base.experts = {PATH: Experts(EXPERTS, 2, known.up, known.down, known.parameters, interleaved=True)}
    with pytest.raises(AdapterRejected, match="never had single experts"):
        compile_folder(adapter, base, "d")

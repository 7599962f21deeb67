"""LORA on stacked expert weights, which only models of routed experts have."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import peft
import torch
from safetensors.torch import save_file

from .case import TARGETS, Case

MOE = ("mixtral", "qwen3_moe", "gpt_oss")  # the last one's weights are transposed and have biases
ROUTER = {"mixtral": "gate.weight", "qwen3_moe": "gate.weight", "gpt_oss": "router.weight"}


def _old_file(block: str, names: tuple[str, str, str], count: int, inner: int) -> Callable[[Path], None]:
    """Writes what transformers 4 and PEFT made: factors for every expert alone, and for the router. names: the gate, up
    and down projection of an expert."""

    def edit(folder: Path) -> None:
        draw = torch.Generator().manual_seed(0)
        shapes = dict.fromkeys(names[:2], (64, inner)) | {names[2]: (inner, 64)}
        modules = {f"experts.{e}.{name}": shape for e in range(count) for name, shape in shapes.items()}
        tensors: dict[str, torch.Tensor] = {}
        for layer in range(2):
            for module, (width, out) in ({"gate": (64, count)} | modules).items():
                key = f"base_model.model.model.layers.{layer}.{block}.{module}"
                tensors[f"{key}.lora_A.weight"] = torch.randn(3, width, generator=draw) * 0.3
                tensors[f"{key}.lora_B.weight"] = torch.randn(out, 3, generator=draw) * 0.3
        save_file(tensors, folder / "adapter_model.safetensors")
        config = json.loads((folder / "adapter_config.json").read_text())
        config |= {"target_modules": ["gate", *names], "target_parameters": None, "r": 3, "lora_alpha": 6}
        (folder / "adapter_config.json").write_text(json.dumps(config))

    return edit


def _any(name: str) -> peft.LoraConfig:
    return peft.LoraConfig(r=3, target_modules=["q_proj"])


CASES = [
    Case(
        "lora-single-experts-mixtral",
        _any,
        architectures=("mixtral",),
        edit=_old_file("block_sparse_moe", ("w1", "w3", "w2"), 4, 96),
    ),
    Case(
        "lora-single-experts-qwen",
        _any,
        architectures=("qwen3_moe",),
        edit=_old_file("mlp", ("gate_proj", "up_proj", "down_proj"), 5, 40),
    ),
    Case(
        "lora-experts",
        lambda name: peft.LoraConfig(
            r=4,
            lora_alpha=12,
            target_modules=TARGETS[name],
            target_parameters=["experts.gate_up_proj", "mlp.experts.down_proj"],
        ),
        architectures=MOE,
    ),
    Case(  # ranks and scales by parameter, one parameter only in the first layer, the router, a linear's bare weight
        "lora-experts-patterns",
        lambda name: peft.LoraConfig(
            r=4,
            use_rslora=True,
            target_modules=[],
            target_parameters=[
                "experts.down_proj",
                "layers.0.mlp.experts.gate_up_proj",
                "gate.weight",
                "q_proj.weight",
            ],
            rank_pattern={"layers.1.mlp.experts.down_proj": 7},
            alpha_pattern={".*gate_up_proj": 3},
        ),
        architectures=MOE,
    ),
]

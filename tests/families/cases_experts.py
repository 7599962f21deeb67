"""LORA on stacked expert weights, which only models of routed experts have."""

from __future__ import annotations

import peft

from .case import TARGETS, Case

MOE = ("mixtral", "qwen3_moe", "gpt_oss")  # the last one's weights are transposed and have biases
ROUTER = {"mixtral": "gate.weight", "qwen3_moe": "gate.weight", "gpt_oss": "router.weight"}

CASES = [
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

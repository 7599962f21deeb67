"""Prompt and prefix families, and activated LoRA."""

from __future__ import annotations

from typing import Any

import peft
import torch
from torch import nn

from .case import TARGETS, Case

INVOCATION = [7, 9, 7]


def _move(model: nn.Module, generator: torch.Generator) -> None:
    """As far as embeddings go: an untrained prompt encoder gives small rows, and a gate of 0 adds nothing."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data + torch.randn(parameter.shape, generator=generator) * 0.5


def _alora(name: str) -> Any:
    """PEFT's mask does not fit OPT's feed-forward modules, which get rows without a batch dimension."""
    targets = [target for target in TARGETS[name] if not target.startswith("fc")]
    return peft.LoraConfig(r=5, target_modules=targets, alora_invocation_tokens=INVOCATION, task_type="CAUSAL_LM")


def _cpt(name: str) -> Any:
    """Deltas of a masked token (type 4) are projected to nothing, those of the others to their epsilon."""
    ids = [3, 17, 40, 55]
    return peft.CPTConfig(
        task_type="CAUSAL_LM",
        cpt_token_ids=ids,
        cpt_mask=[1] * 4,
        cpt_tokens_type_mask=[1, 2, 3, 4],
        opt_projection_epsilon=2.0,
        opt_projection_format_epsilon=1.0,
    )


def _task() -> dict[str, Any]:
    return {"task_ids": torch.tensor([0])}


_CAUSAL: dict[str, Any] = {"task_type": "CAUSAL_LM"}

CASES = [
    Case("prompt", lambda name: peft.PromptTuningConfig(num_virtual_tokens=7, **_CAUSAL), move=_move),
    Case(
        "p-tuning-mlp",
        lambda name: peft.PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=24, **_CAUSAL),
        move=_move,
    ),
    Case(
        "p-tuning-lstm",
        lambda name: peft.PromptEncoderConfig(
            num_virtual_tokens=3, encoder_reparameterization_type="LSTM", encoder_hidden_size=24, **_CAUSAL
        ),
        architectures=("llama",),  # the file holds its output: nothing else differs from the MLP's
        move=_move,
    ),
    Case("cpt", _cpt, move=_move),
    Case(
        "multitask-prompt",
        lambda name: peft.MultitaskPromptTuningConfig(num_virtual_tokens=6, num_tasks=3, num_ranks=2, **_CAUSAL),
        move=_move,
        forward=_task,
    ),
    Case(
        "prefix",
        lambda name: peft.PrefixTuningConfig(num_virtual_tokens=11, **_CAUSAL),
        move=_move,  # longer than the sliding window of gemma2's first layer
    ),
    Case(
        "prefix-projection",
        lambda name: peft.PrefixTuningConfig(
            num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=20, **_CAUSAL
        ),
        move=_move,
    ),
    Case(
        "cartridge",
        lambda name: peft.CartridgeConfig(num_virtual_tokens=9, num_frozen_tokens=2, **_CAUSAL),
        move=_move,
    ),
    Case(
        "adaption-prompt",
        lambda name: peft.AdaptionPromptConfig(adapter_len=5, adapter_layers=2 if name == "gpt2" else 1, **_CAUSAL),
        architectures=("llama", "mistral", "gpt2"),  # PEFT has it for these
        move=_move,
    ),
    Case(
        "alora",
        _alora,
        tokens=(*range(20, 30), *INVOCATION, *range(40, 45), *INVOCATION, 9, 7, *range(60, 64)),
    ),
    Case("alora-early", _alora, architectures=("llama",), tokens=(*INVOCATION, *range(60, 80))),
]

"""LORA."""

from __future__ import annotations

import peft

from .case import TARGETS, Case

CASES = [
    Case("lora", lambda name: peft.LoraConfig(r=6, lora_alpha=12, target_modules=TARGETS[name])),
    Case("lora-rs", lambda name: peft.LoraConfig(r=9, use_rslora=True, target_modules="all-linear")),
]

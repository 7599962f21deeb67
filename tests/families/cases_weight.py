"""Families that compute from the base's weight at load, and their relatives: MISS, HRA, DEFT, PEANUT, PSOFT, OSF.

PEFT builds all of them but DEFT over nn.Linear only, so GPT-2's Conv1D has no case of them (OSF passes it over in
silence).
"""

from __future__ import annotations

import peft
import torch
from torch import nn

from .case import ALL_FIVE, TARGETS, Case

LINEAR = tuple(name for name in ALL_FIVE if name != "gpt2")


def _all(architecture: str, family: str) -> str:
    """OPT's second norm reads rows without their batch, so it is no site and its bias is not served."""
    return f"{family}_only" if architecture == "opt" else "all"


def _move_a_little(model: nn.Module, generator: torch.Generator) -> None:
    """Blocks that multiply the base's weight: more would drown float32 in the size of the activations."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.03


CASES = [
    Case("miss", lambda name: peft.MissConfig(r=8, target_modules=TARGETS[name]), LINEAR),
    Case("miss-odd", lambda name: peft.MissConfig(r=7, init_weights=False, target_modules=TARGETS[name]), LINEAR),
    Case(
        "miss-mini",
        lambda name: peft.MissConfig(
            r=6, mini_r=8, init_weights="mini", bias="miss_only", target_modules=TARGETS[name]
        ),
        LINEAR,
    ),
    Case(
        "miss-bat",
        lambda name: peft.MissConfig(r=8, init_weights="bat", target_modules=TARGETS[name]),
        LINEAR,
        _move_a_little,
    ),
    Case("hra", lambda name: peft.HRAConfig(r=5, bias=_all(name, "hra"), target_modules=TARGETS[name]), LINEAR),
    Case("hra-gs", lambda name: peft.HRAConfig(r=4, apply_GS=True, target_modules=TARGETS[name]), LINEAR),
    Case("deft", lambda name: peft.DeftConfig(r=4, alpha=6, bias="deft_only", target_modules=TARGETS[name])),
    Case("deft-qr", lambda name: peft.DeftConfig(r=4, decomposition_method="qr", target_modules=TARGETS[name])),
    Case(
        "deft-para",
        lambda name: peft.DeftConfig(r=3, para=True, decomposition_method="qr", target_modules=TARGETS[name]),
    ),
    Case("peanut", lambda name: peft.PeanutConfig(r=6, scaling=0.5, target_modules=TARGETS[name]), LINEAR),
    Case(
        "peanut-deep",
        lambda name: peft.PeanutConfig(r=6, depth=2, act_fn="gelu", target_modules=TARGETS[name]),
        LINEAR,
    ),
    Case("psoft", lambda name: peft.PsoftConfig(r=8, psoft_alpha=4, target_modules=TARGETS[name]), LINEAR),
    Case(
        "psoft-neumann",
        lambda name: peft.PsoftConfig(
            r=8,
            ab_svd_init="pissa_init",
            psoft_svd="lowrank",
            psoft_svd_lowrank_niter=3,
            random_seed=5,
            use_cayley_neumann=True,
            cayley_neumann_eps=0.5,
            psoft_mag_a=False,
            target_modules=TARGETS[name],
        ),
        LINEAR,
    ),
    Case(
        "psoft-free",
        lambda name: peft.PsoftConfig(r=6, psoft_orth=False, psoft_mag_b=False, target_modules=TARGETS[name]),
        LINEAR,
    ),
    Case("osf", lambda name: peft.OSFConfig(effective_rank=56, target_modules=TARGETS[name]), LINEAR),
    Case("osf-half", lambda name: peft.OSFConfig(rank_pattern={"0": 0.9}, target_modules=TARGETS[name]), LINEAR),
]

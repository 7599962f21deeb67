"""ADAMSS and FROD: a basis of the base's weight, saved or computed again.

OPT's second norm reads rows without their batch, so it is no site and its bias is not served.
"""

from __future__ import annotations

import peft

from .case import ALL_FIVE, TARGETS, Case

LINEAR = tuple(name for name in ALL_FIVE if name != "gpt2")  # PEFT builds ADAMSS over nn.Linear only

CASES = [
    Case(
        "adamss",
        lambda name: peft.AdamssConfig(
            r=12, num_subspaces=4, subspace_rank=3, random_seed=3, target_modules=TARGETS[name]
        ),
        LINEAR,
    ),
    Case(
        "adamss-dynamic",
        lambda name: peft.AdamssConfig(
            r=200,
            num_subspaces=3,
            subspace_rank=5,
            use_dynamic_rank=True,
            svd_threshold=0.3,
            target_modules=TARGETS[name],
        ),
        LINEAR,
    ),
    Case(
        "frod",
        lambda name: peft.FrodConfig(
            sparse_rate=0.02, bias="none" if name == "opt" else "all", progressbar=False, target_modules=TARGETS[name]
        ),
    ),
    Case(
        "frod-unsaved",
        lambda name: peft.FrodConfig(
            save_projection=False,
            projection_prng_key=7,
            regularization_alpha=0.01,
            progressbar=False,
            target_modules=TARGETS[name],
        ),
    ),
]

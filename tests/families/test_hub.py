"""AdapterHub's methods equal their recomputation, in a batch with the base and a LoRA, in one go and in chunks.

The adapters library cannot be installed beside this transformers; folders are written as it writes them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .case import ALL_FIVE
from .hub_files import BOTTLENECK, LORA, PREFIX, REFT, HubCase
from .hub_oracle import hub_applied
from .recomputed import check_served, load

HOULSBY = BOTTLENECK | {"mh_adapter": True, "original_ln_before": False, "non_linearity": "swish"}
PARALLEL = BOTTLENECK | {"is_parallel": True, "original_ln_before": False, "reduction_factor": 8}
PLUS = BOTTLENECK | {"original_ln_after": False, "residual_before_ln": False, "scaling": "channel"}
COMPACTER = BOTTLENECK | {"phm_layer": True, "reduction_factor": 8, "non_linearity": "gelu"}
IA3 = LORA | {"composition_mode": "scale", "r": 1, "alpha": 1, "intermediate_lora": True}
NOREFT = REFT | {"orthogonality": False, "suffix_positions": 4}
PREFIX_BASES = ("llama_mha", "gpt2")  # the library's prefixes have a key head for every query head
CASES = [
    HubCase("seq-bn", (BOTTLENECK | {"reduction_factor": {"0": 4, "default": 16}, "non_linearity": "gelu"},)),
    HubCase("seq-bn-old", (BOTTLENECK | {"non_linearity": "gelu", "leave_out": [0]},), version=None),
    HubCase("double-seq-bn", (HOULSBY,), architectures=("llama", "gpt2", "mistral")),
    HubCase("par-bn", (PARALLEL | {"scaling": "learned", "mh_adapter": True, "non_linearity": "leakyrelu"},)),
    HubCase("par-bn-fixed", (PARALLEL | {"scaling": 4.0},), architectures=("mistral",)),
    HubCase("adapter-plus", (PLUS | {"non_linearity": "tanh"},)),
    HubCase("compacter", (COMPACTER | {"mh_adapter": True, "original_ln_before": False, "phm_rank": 2},)),
    HubCase("compacter-thin-rule", (COMPACTER | {"factorized_phm_rule": True, "factorized_phm_W": False},)),
    HubCase("compacter-own-rule", (COMPACTER | {"shared_phm_rule": False, "phm_bias": False, "phm_dim": 2},)),
    HubCase("compacter-shared-weight", (COMPACTER | {"shared_W_phm": True},)),
    HubCase("hub-lora", (LORA | {"intermediate_lora": True, "output_lora": True},)),
    HubCase("hub-lora-below-1-1", (LORA | {"attn_matrices": ["k"]},), version="adapters.1.0.1"),
    HubCase("hub-ia3", (IA3 | {"attn_matrices": ["k", "v"], "output_lora": True, "alpha": 2},)),
    # The library has no VeRA on GPT-2's fused projection.
    HubCase("hub-vera", (LORA | {"attn_matrices": ["q"], "vera_d": 0.1, "vera_b": 0.0},), architectures=("llama",)),
    HubCase("hub-prefix", (PREFIX,), architectures=PREFIX_BASES),
    HubCase("hub-prefix-flat", (PREFIX | {"flat": True, "prefix_length": 9},), architectures=PREFIX_BASES),
    HubCase("loreft", (REFT,), architectures=ALL_FIVE),
    HubCase("loreft-both-ends", (REFT | {"suffix_positions": 6, "layers": [1]},), architectures=ALL_FIVE),
    HubCase("loreft-tied", (REFT | {"suffix_positions": 2, "tied_weights": True},)),
    HubCase("loreft-whole", (REFT | {"r": 64, "prefix_positions": 15, "suffix_positions": 12},)),
    HubCase("noreft", (NOREFT,), architectures=ALL_FIVE),
    HubCase("noreft-suffix", (NOREFT | {"prefix_positions": 0},)),
    HubCase("direft", (NOREFT | {"subtract_projection": False},), architectures=ALL_FIVE),
    HubCase("reft-activation", (NOREFT | {"non_linearity": "tanh"},)),
    HubCase("direft-activation", (NOREFT | {"non_linearity": "gelu", "subtract_projection": False},)),
    HubCase("mam", (PREFIX, PARALLEL | {"mh_adapter": True, "scaling": 4.0}), architectures=PREFIX_BASES),
    HubCase(
        "union",
        (
            LORA,
            HOULSBY | {"output_adapter": False},
            BOTTLENECK | {"leave_out": [0]},
            PARALLEL | {"leave_out": [1]},
        ),
    ),
]
RUNS = [(case, architecture) for case in CASES for architecture in case.architectures]


@pytest.mark.parametrize(("case", "architecture"), RUNS, ids=[f"{case.name}-{name}" for case, name in RUNS])
def test_hub_method_equals_its_recomputation(
    case: HubCase,
    architecture: str,
    checkpoint: Callable[..., Path],
    driver_of: Callable[[str], Any],
    families_cache: Path,
    tmp_path: Path,
) -> None:
    base, folder = checkpoint(architecture), tmp_path / case.name
    case.write(load(base), folder)
    applied = functools.partial(hub_applied, folder)
    check_served(driver_of(architecture), base, architecture, folder, applied, families_cache / "recomputed")

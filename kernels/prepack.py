"""Weights in oneDNN's own layout: small-batch products skip the reordering that they otherwise do on every call.

The only user of torch's private mkldnn ops. Where a build lacks them, ``supported`` says so and callers use plain ops.
Measured in bf16 at 16 rows of [480, 576]: 86 us plain, 59 us prepacked; the reordering itself takes 400 us.
"""

from __future__ import annotations

import torch
from torch import Tensor


def supported(dtype: torch.dtype) -> bool:
    """Whether products with prepacked weights of this type exist here."""
    ops = torch.ops.mkldnn
    if not (hasattr(ops, "_linear_pointwise") and hasattr(ops, "_reorder_linear_weight")):
        return False
    if dtype is torch.bfloat16:
        return bool(ops._is_mkldnn_bf16_supported())
    return dtype is torch.float32 and torch._C._has_mkldnn


def prepack(weight: Tensor, rows: int) -> Tensor:
    """A copy of [out_features, in_features] in the layout that suits ``rows`` rows of input. Opaque."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
    return packed


def product(x: Tensor, packed: Tensor) -> Tensor:
    """x @ weight.T: [rows, out_features]."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    return out

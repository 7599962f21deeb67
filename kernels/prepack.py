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
    if not (torch._C._has_mkldnn and hasattr(ops, "_linear_pointwise") and hasattr(ops, "_reorder_linear_weight")):
        return False
    if dtype is torch.bfloat16:
        return bool(ops._is_mkldnn_bf16_supported())
    return dtype is torch.float32


def prepack(weight: Tensor, rows: int | None = None) -> Tensor:
    """A copy of [out_features, in_features] in the layout that suits ``rows`` rows of input (None: any). Opaque.

    ``.to_dense()`` gives the plain weight back, bit by bit.
    """
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
    return packed


def product(x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias: [..., out_features]."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return out

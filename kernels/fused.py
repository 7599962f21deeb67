"""Launches of fused_kernels.py. On CUDA, or under TRITON_INTERPRET=1 on the CPU; fp32, bf16 and fp16."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from onebase.kernels.fused_kernels import gate_kernel, rms_norm_kernel, rotary_kernel
from onebase.kernels.sizes import cdiv, next_power_of_2

Activation = Literal["silu", "gelu", "gelu_tanh"]
ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu_tanh", "gelu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDEST_NORM = 16384  # a row is held in registers
_GATE_BLOCK = 1024


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, offset: float, rounded: bool) -> Tensor:
    """x: [..., width] -> the same shape, contiguous. Leading dimensions that do not collapse into one are copied."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch_norm(x, None, weight, out, out, eps, offset, rounded)
    return out


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, offset: float, rounded: bool
) -> tuple[Tensor, Tensor]:
    """x + residual, rounded to their type, and what rms_norm gives of that. Both [..., width], of one shape."""
    total, out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    _launch_norm(x, residual, weight, total, out, eps, offset, rounded)
    return total, out


def _launch_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    total: Tensor,
    out: Tensor,
    eps: float,
    offset: float,
    rounded: bool,
) -> None:
    width = weight.shape[0]
    rows = _as_rows(x, width)
    more = rows if residual is None else _as_rows(residual, width)
    block = next_power_of_2(width)
    height = max(1, 1024 // block)
    rms_norm_kernel[(cdiv(len(rows), height),)](
        rows, more, weight, total, out, rows.stride(0), more.stride(0), len(rows), width, eps, offset,
        ADDS=residual is not None, ROUNDED=rounded, BLOCK_M=height, BLOCK_W=block,
        num_warps=max(4, min(16, block // 512)),
    )  # fmt: skip


def _as_rows(x: Tensor, width: int) -> Tensor:
    rows = x.reshape(-1, width)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q: [1, H, T, D], k: [1, KV, T, D], last stride 1; cos and sin: [1, T, D], contiguous. Half rotation, as Llama's.

    Products are rounded before they are added, as torch's are: the compiler must not fuse them. Returns views
    [1, heads, T, D] of memory in which tokens are outermost."""
    (_, heads, tokens, dim), kv_heads = q.shape, k.shape[1]
    q_out, k_out = (torch.empty((1, tokens, n, dim), dtype=q.dtype, device=q.device) for n in (heads, kv_heads))
    rotary_kernel[(tokens, 2)](
        q, k, q_out, k_out, cos, sin, q.stride(2), q.stride(1), k.stride(2), k.stride(1),
        Q_HEADS=heads, K_HEADS=kv_heads, HALF=dim // 2, BLOCK_Q=next_power_of_2(heads),
        BLOCK_K=next_power_of_2(kv_heads), BLOCK_D=next_power_of_2(dim // 2), enable_fp_fusion=False,
    )  # fmt: skip
    return q_out.transpose(1, 2), k_out.transpose(1, 2)


def gated(gate: Tensor, up: Tensor, kind: Activation) -> Tensor:
    """activation(gate) * up. Both [..., width], last stride 1 -> contiguous."""
    width = gate.shape[-1]
    gates, ups = gate.reshape(-1, width), up.reshape(-1, width)
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    gate_kernel[(len(gates), cdiv(width, _GATE_BLOCK))](
        gates, ups, out, gates.stride(0), ups.stride(0), width, KIND=kind, BLOCK=_GATE_BLOCK
    )
    return out

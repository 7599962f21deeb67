"""Triton kernels of what a decoder computes between its products: RMS norms, rotary positions, gated activations.

Each rounds where transformers' own operators round, so that nearly all bits are theirs; fused.py launches them. Row
counts change with the batch, so they are exempt from Triton's classes of an argument.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows", "eps", "offset"])
def rms_norm_kernel(
    x,  # [rows, width], row stride x_stride
    residual,  # [rows, width], row stride residual_stride
    weight,  # [width]
    total,  # [rows, width], contiguous
    out,  # [rows, width], contiguous
    x_stride,
    residual_stride,
    rows,
    width,
    eps,
    offset,
    ADDS: tl.constexpr,  # total = x + residual, rounded, and its norm; else x's, and the two are not used
    ROUNDED: tl.constexpr,  # the normalised row is rounded before its weight
    BLOCK_M: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """(offset + weight) * x / sqrt(mean(x^2) + eps). Grid: (row blocks,)."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_W)
    mask = (row < rows)[:, None] & (column < width)[None, :]
    place = row.to(tl.int64)[:, None]
    values = tl.load(x + place * x_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
    if ADDS:
        values += tl.load(residual + place * residual_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        both = values.to(total.dtype.element_ty)
        tl.store(total + place * width + column[None, :], both, mask=mask)
        values = both.to(tl.float32)
    values *= tl.rsqrt(tl.sum(values * values, 1) / width + eps)[:, None]
    if ROUNDED:
        values = values.to(out.dtype.element_ty).to(tl.float32)
    factor = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32) + offset
    tl.store(out + place * width + column[None, :], (factor[None, :] * values).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _turn_heads(x, out, t, x_t, x_h, cos, sin, HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr,
                BLOCK_D: tl.constexpr):  # fmt: skip
    """All heads of token t: out, contiguous, becomes x * cos + rotate_half(x) * sin."""
    head, dim = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    mask = (head < HEADS)[:, None] & (dim < HALF)[None, :]
    source = x + t * x_t + head[:, None] * x_h + dim[None, :]
    kind = out.dtype.element_ty
    one = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    two = tl.load(source + HALF, mask=mask, other=0.0).to(tl.float32)
    at = t * 2 * HALF + dim
    cos_one = tl.load(cos + at, mask=dim < HALF, other=0.0).to(tl.float32)[None, :]
    cos_two = tl.load(cos + at + HALF, mask=dim < HALF, other=0.0).to(tl.float32)[None, :]
    sin_one = tl.load(sin + at, mask=dim < HALF, other=0.0).to(tl.float32)[None, :]
    sin_two = tl.load(sin + at + HALF, mask=dim < HALF, other=0.0).to(tl.float32)[None, :]
    first = (one * cos_one).to(kind).to(tl.float32) - (two * sin_one).to(kind).to(tl.float32)
    second = (two * cos_two).to(kind).to(tl.float32) + (one * sin_two).to(kind).to(tl.float32)
    target = out + (t * HEADS + head[:, None]) * 2 * HALF + dim[None, :]
    tl.store(target, first.to(kind), mask=mask)
    tl.store(target + HALF, second.to(kind), mask=mask)


@triton.jit
def rotary_kernel(
    q,  # [tokens, Q_HEADS, 2 * HALF], strides q_t, q_h, 1
    k,  # [tokens, K_HEADS, 2 * HALF]
    q_out,  # contiguous
    k_out,
    cos,  # [tokens, 2 * HALF], contiguous
    sin,
    q_t,
    q_h,
    k_t,
    k_h,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid: (tokens, 2): the queries, and the keys."""
    t = tl.program_id(0).to(tl.int64)
    if tl.program_id(1) == 0:
        _turn_heads(q, q_out, t, q_t, q_h, cos, sin, Q_HEADS, HALF, BLOCK_Q, BLOCK_D)
    else:
        _turn_heads(k, k_out, t, k_t, k_h, cos, sin, K_HEADS, HALF, BLOCK_K, BLOCK_D)


@triton.jit
def _sigmoid(x):
    """Without exponents that overflow."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, small) / (1.0 + small)


@triton.jit
def _activation(x, KIND: tl.constexpr):
    if KIND == "silu":
        return x * _sigmoid(x)
    if KIND == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    return x * _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))  # 0.5 * (1 + tanh(sqrt(2 / pi) * ...))


@triton.jit
def gate_kernel(
    gate,  # [rows, width], row stride gate_stride
    up,  # [rows, width], row stride up_stride
    out,  # [rows, width], contiguous
    gate_stride,
    up_stride,
    width,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """activation(gate) * up. Grid: (rows, column blocks)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    given = tl.load(gate + row * gate_stride + column, mask=mask, other=0.0).to(tl.float32)
    active = _activation(given, KIND).to(out.dtype.element_ty).to(tl.float32)
    factor = tl.load(up + row * up_stride + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, (active * factor).to(out.dtype.element_ty), mask=mask)

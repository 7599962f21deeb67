"""y = x W^T for one to four rows of x: what decoding few sequences waits for is to read W once.

Products and sums in float32 without tensor cores, which would have 16 rows to fill; sums in a fixed order.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _part(x, row, rows, x_stride, k, inside):
    """A block of one row of x in float32: beyond the last row that one again, whose sums are not stored."""
    return tl.load(x + tl.minimum(row, rows - 1) * x_stride + k, mask=inside, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _store(acc, out, bias, row, rows, n, out_features, HAS_BIAS: tl.constexpr):
    """acc: [N, K], summed over K."""
    total = tl.sum(acc, 1)
    live = n < tl.where(row < rows, out_features, 0)
    if HAS_BIAS:
        total += tl.load(bias + n, mask=live, other=0.0).to(tl.float32)
    tl.store(out + row * out_features + n, total.to(out.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["rows"])
def few_rows_kernel(
    x,  # [rows, in_features], row stride x_stride
    weight,  # [out_features, in_features]
    bias,  # [out_features]
    out,  # [rows, out_features]
    rows,
    x_stride,
    out_features,
    in_features,
    ROWS: tl.constexpr,  # 1, or 4 for two to four rows
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Program n: BLOCK_N rows of W, each read once. Beyond the last one the last is read again and not stored."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    w_rows = weight + tl.minimum(n, out_features - 1).to(tl.int64)[:, None] * in_features
    acc_0 = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    acc_1, acc_2, acc_3 = acc_0, acc_0, acc_0
    for start in range(0, in_features, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = k < in_features
        w = tl.load(w_rows + k[None, :], mask=inside[None, :], other=0.0).to(tl.float32)  # [N, K]
        acc_0 += w * _part(x, 0, rows, x_stride, k, inside)
        if ROWS > 1:
            acc_1 += w * _part(x, 1, rows, x_stride, k, inside)
            acc_2 += w * _part(x, 2, rows, x_stride, k, inside)
            acc_3 += w * _part(x, 3, rows, x_stride, k, inside)
    _store(acc_0, out, bias, 0, rows, n, out_features, HAS_BIAS)
    if ROWS > 1:
        _store(acc_1, out, bias, 1, rows, n, out_features, HAS_BIAS)
        _store(acc_2, out, bias, 2, rows, n, out_features, HAS_BIAS)
        _store(acc_3, out, bias, 3, rows, n, out_features, HAS_BIAS)

# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, no-check-untyped-defs
"""K and V in 8 bits in Triton: what kv_fp8.py defines, bit for bit."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _rounded(x):
    """To the nearest value of e4m3, ties to even, below 2^8: the cast that follows is exact, whoever does it.

    Adding and subtracting 1.5 * 2^20 units of x's leading bit leaves three bits behind that one."""
    leading = tl.maximum((x.to(tl.int32, bitcast=True) >> 23) & 0xFF, 127 - 6)  # below 2^-6 the spacing stays
    large = (((leading + 20) << 23) | 0x400000).to(tl.float32, bitcast=True)
    return (x + large) - large


@triton.jit
def _encode(x, pages, exponents, place, live):
    """Stores a vector as kv_fp8.encode has it, its exponent at ``exponents``."""
    wide = x.to(tl.float32)
    top = tl.max((wide.to(tl.int32, bitcast=True) & 0x7FFFFFFF), 0) >> 23
    exponent = tl.minimum(tl.maximum(top - 7, 1), 254)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    tl.store(pages + place, _rounded(wide * inverse).to(pages.dtype.element_ty), mask=live)
    tl.store(exponents, tl.where(top == 255, 255, exponent).to(tl.uint8))


@triton.jit
def write_fp8(
    k, v, k_pages, v_pages, k_exponents, v_exponents, slots, k_t, k_h, k_d, v_t, v_h, v_d,
    page_stride, slot_stride, head_stride, DIM: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (token, head) encodes K and V of one head of one token into its slot. Exponents lie a byte apart."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    slot = tl.load(slots + token)
    dim = tl.arange(0, BLOCK)
    live = dim < DIM
    page = slot // PAGE * page_stride + head * head_stride
    place, exponent = page + slot % PAGE * slot_stride + dim, page + slot % PAGE
    keys = tl.load(k + token * k_t + head * k_h + dim * k_d, mask=live, other=0.0)
    _encode(keys, k_pages, k_exponents + exponent, place, live)
    values = tl.load(v + token * v_t + head * v_h + dim * v_d, mask=live, other=0.0)
    _encode(values, v_pages, v_exponents + exponent, place, live)


@triton.jit
def decode(codes, exponents, known, dtype: tl.constexpr):
    """[N, D] in ``dtype``: codes times 2^(exponent - 127). exponents: [N] places."""
    bits = tl.load(exponents, mask=known, other=0).to(tl.int32) << 23
    return (codes.to(tl.float32) * bits.to(tl.float32, bitcast=True)[:, None]).to(dtype)

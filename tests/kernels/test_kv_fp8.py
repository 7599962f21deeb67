"""K and V in 8 bits: how far from what went in, and that the fast decoding gives the bits of the plain one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onebase.kernels.kv_fp8 import NOT_FINITE, decode, decode_fast, encode

TYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 1 << 20), st.floats(-30, 30), st.sampled_from([torch.float32, torch.bfloat16]))
def test_the_error_is_bounded_by_the_element_and_the_largest(seed: int, size: float, dtype: torch.dtype) -> None:
    """Whatever the size: nothing saturates. Elements of one vector may differ by orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 3, 64, generator=generator).mul_(torch.randn(5, 3, 64, generator=generator).mul_(3).exp_())
    x = x.mul_(2.0**size).to(dtype)
    error = (decode(*encode(x), dtype).double() - x.double()).abs()
    bound = x.double().abs() * 2**-4 + x.double().abs().amax(-1, keepdim=True) * 2**-16
    assert bool((error <= bound).all())


@pytest.mark.parametrize("dtype", TYPES)
def test_fast_decoding_is_decoding(dtype: torch.dtype) -> None:
    """Every code under every exponent that values of the type can have; overflows and subnormal results included."""
    codes = torch.arange(256, dtype=torch.uint8).repeat(256, 1)
    exponents = torch.arange(256, dtype=torch.uint8)
    codes = codes[:, (codes[0] & 0x7F) != 0x7F]  # the codes of NaN: encode leaves them to the exponent
    want, got = decode(codes, exponents, dtype), decode_fast(codes, exponents, dtype)
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so(bad: float) -> None:
    x = torch.ones(3, 8)
    x[1, 2] = bad
    codes, exponents = encode(x)
    assert exponents.tolist()[1] == NOT_FINITE
    for way in (decode, decode_fast):
        got = way(codes, exponents, torch.float32)
        assert not got[1].isfinite().any()
        assert torch.equal(got[::2], x[::2])


def test_zeros_are_zeros() -> None:
    assert not decode_fast(*encode(torch.zeros(2, 8)), torch.bfloat16).any()

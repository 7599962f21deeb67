"""K and V in 8 bits: float8 e4m3 codes, and a power of two for each token and head, as in OCP's microscaling formats.

A scale of its own for each token and head needs no calibration and never saturates, whatever a client sends; as a power
of two it is one byte, and decoding is exact in every type that attention computes in.
"""

from __future__ import annotations

import torch
from torch import Tensor

CODE = torch.float8_e4m3fn
NOT_FINITE = 255  # the exponent of infinities and NaN
_HEADROOM = 7  # the largest value is scaled into [2^7, 2^8): e4m3 ends at 448


def encode(x: Tensor) -> tuple[Tensor, Tensor]:
    """x: [..., dim], any float type -> codes uint8 [..., dim], exponents uint8 [...], biased by 127.

    The error of an element is at most 2^-4 of it, or 2^-16 of the largest of its vector. A vector with an infinity or
    a NaN in it decodes to nothing finite.
    """
    wide = x.float()
    top = wide.abs().amax(dim=-1).view(torch.int32) >> 23
    exponents = (top - _HEADROOM).clamp_(1, 254)
    codes = (wide * power(254 - exponents)[..., None]).to(CODE)
    return codes.view(torch.uint8), exponents.masked_fill_(top == NOT_FINITE, NOT_FINITE).to(torch.uint8)


def decode(codes: Tensor, exponents: Tensor, dtype: torch.dtype) -> Tensor:
    """The definition of what codes mean: [..., dim] in ``dtype``."""
    return (codes.view(CODE).float() * power(exponents)[..., None]).to(dtype)


def decode_fast(codes: Tensor, exponents: Tensor, dtype: torch.dtype) -> Tensor:
    """The same bits as ``decode``, on a CPU five times as fast: codes are shifted to where ``dtype`` has its exponent,
    which leaves them too small by a power of two."""
    if dtype not in _SHIFTS:
        return decode(codes, exponents, dtype)
    integers, sign, magnitude, bias = _SHIFTS[dtype]
    bits = codes.to(integers)
    shifted = (bits & 0x80).bitwise_left_shift_(sign).bitwise_or_((bits & 0x7F).bitwise_left_shift_(magnitude))
    # twice: the power that corrects both at once may lie beyond the type
    return shifted.view(dtype).mul_(2.0**bias).mul_(power(exponents).to(dtype)[..., None])


# dtype -> integers of its size, how far the sign and the rest move up, the difference of the exponents' biases
_SHIFTS = {torch.bfloat16: (torch.int16, 8, 4, 120), torch.float32: (torch.int32, 24, 20, 120)}


def power(exponents: Tensor) -> Tensor:
    """2^(exponent - 127), float32."""
    return (exponents.to(torch.int32) << 23).view(torch.float32)

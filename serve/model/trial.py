"""Whether a faster body gives the numbers of the module's own forward: tried at start, on the device at hand."""

from __future__ import annotations

import torch
from torch import Tensor

_SAME = 0.99  # share of elements with the same bits; sums in another order round otherwise now and then


def same_numbers(got: Tensor, expected: Tensor) -> bool:
    """Up to the rounding of the type; in half precision nearly all bits are to be equal."""
    if got.dtype != expected.dtype or got.shape != expected.shape:
        return False
    atol = 1e-6 * max(1.0, float(expected.abs().max()))
    if expected.dtype is torch.float32:
        return torch.allclose(got, expected, rtol=1e-5, atol=atol)
    close = torch.allclose(got.float(), expected.float(), rtol=2 * torch.finfo(expected.dtype).eps, atol=atol)
    return close and float((got == expected).float().mean()) >= _SAME


def noise(*shape: int, like: Tensor, seed: int = 0) -> Tensor:
    """Of ``like``'s type and device, the same at every start."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(like.device, like.dtype)


def uses_triton(tensor: Tensor) -> bool:
    """Whether its device gets Triton's bodies."""
    return tensor.device.type == "cuda"

"""RMS norms in one pass over the rows on the CPU; torch takes eight, with a float32 copy of the rows between them.

Which formula a norm has is not read off its name: every known one is tried on its own weight, and it keeps its own
forward unless one gives the same numbers. The forward is the plain twin.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from onebase.kernels.native.library import Native, native

_ROWS = 16  # of the trial
_SAME = 0.99  # share of elements with the same bits; sums in another order round otherwise now and then


@dataclass(frozen=True, slots=True)
class Formula:
    """(offset + weight) * x / sqrt(mean(x^2) + eps). rounded: the second factor is rounded to the model's type."""

    offset: float
    rounded: bool


FORMULAS = (Formula(0.0, rounded=True), Formula(0.0, rounded=False), Formula(1.0, rounded=False))


@dataclass(frozen=True, slots=True, eq=False)
class FusedNorm:
    """Forward of one norm."""

    functions: Native
    weight: Tensor
    eps: float
    formula: Formula

    def __call__(self, x: Tensor) -> Tensor:
        """x: [..., width], of the weight's dtype."""
        rows, out = x.contiguous(), torch.empty(x.shape, dtype=x.dtype)
        width, formula = self.weight.shape[0], self.formula
        self.functions.rms_norm(
            rows.data_ptr(),
            self.weight.data_ptr(),
            out.data_ptr(),
            x.numel() // width,
            width,
            self.eps,
            formula.offset,
            formula.rounded,
        )
        return out


@torch.inference_mode()
def fuse_norms(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Put a fused forward in place of each norm's that it gives the same numbers as; those are returned."""
    fused = []
    for module in modules:
        forward = _fused(module)
        if forward is not None:
            setattr(module, "forward", forward)  # noqa: B010  a method for the type checker
            fused.append(module)
    return fused


def _fused(module: nn.Module) -> FusedNorm | None:
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, Tensor) or weight.device.type != "cpu" or not isinstance(eps, float):
        return None
    functions = native(weight.dtype)
    if functions is None or not weight.is_contiguous():
        return None
    found = (FusedNorm(functions, weight.detach(), eps, formula) for formula in FORMULAS)
    return next((forward for forward in found if _is_same(module, forward)), None)


def _is_same(module: nn.Module, forward: FusedNorm) -> bool:
    """On rows whose mean is not zero and whose scale differs, so that other kinds of norms stand out."""
    generator = torch.Generator().manual_seed(0)
    width, dtype = forward.weight.shape[0], forward.weight.dtype
    scale = torch.logspace(-2, 2, _ROWS)[:, None]
    x = ((torch.randn(_ROWS, width, generator=generator) + 0.5) * scale).to(dtype)[None]
    expected, got = module(x), forward(x)
    if expected.dtype != dtype or expected.shape != got.shape:
        return False
    if dtype is torch.float32:
        return torch.allclose(got, expected, rtol=1e-5, atol=1e-7)
    close = torch.allclose(got.float(), expected.float(), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    return close and float((got == expected).float().mean()) >= _SAME

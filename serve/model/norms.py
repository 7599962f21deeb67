"""RMS norms in one pass over the rows; torch takes eight, with a float32 copy of the rows between them.

Which formula a norm has is not read off its name: every known one is tried on its own weight, and it keeps its own
forward unless one gives the same numbers. The forward is the plain twin.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from onebase.kernels.native.library import Native, native
from onebase.serve.model.trial import noise, replace_forwards, same_numbers, uses_triton

_ROWS = 16  # of the trial


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
        out = torch.empty(x.shape, dtype=x.dtype)
        self._run(x.contiguous(), None, None, out)
        return out

    def of_sum(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """x + residual, and its norm. Both [..., width], of one shape and of the weight's dtype."""
        total, out = (torch.empty(x.shape, dtype=x.dtype) for _ in range(2))
        self._run(x.contiguous(), residual.contiguous(), total, out)
        return total, out

    def _run(self, x: Tensor, residual: Tensor | None, total: Tensor | None, out: Tensor) -> None:
        width = self.weight.shape[0]
        self.functions.rms_norm(
            x.data_ptr(),
            None if residual is None else residual.data_ptr(),
            self.weight.data_ptr(),
            None if total is None else total.data_ptr(),
            out.data_ptr(),
            x.numel() // width,
            width,
            self.eps,
            self.formula.offset,
            self.formula.rounded,
        )


@dataclass(frozen=True, slots=True, eq=False)
class LaunchedNorm:
    """Forward of one norm, in a Triton launch."""

    weight: Tensor
    eps: float
    formula: Formula

    def __call__(self, x: Tensor) -> Tensor:
        """x: [..., width], of the weight's dtype."""
        from onebase.kernels.fused import rms_norm

        return rms_norm(x, self.weight, self.eps, offset=self.formula.offset, rounded=self.formula.rounded)

    def of_sum(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """See FusedNorm."""
        from onebase.kernels.fused import add_rms_norm

        formula = self.formula
        return add_rms_norm(x, residual, self.weight, self.eps, offset=formula.offset, rounded=formula.rounded)


Norm = FusedNorm | LaunchedNorm


def fuse_norms(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Put a fused forward in place of each norm's that it gives the same numbers as; those are returned."""
    return replace_forwards(modules, _fused)


def _fused(module: nn.Module) -> Norm | None:
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, Tensor) or not weight.is_contiguous() or not isinstance(eps, float):
        return None
    found = (forward for formula in FORMULAS if (forward := _made(weight.detach(), eps, formula)) is not None)
    return next((forward for forward in found if _is_same(module, forward)), None)


def _made(weight: Tensor, eps: float, formula: Formula) -> Norm | None:
    if uses_triton(weight):
        from onebase.kernels.fused import DTYPES, WIDEST_NORM

        fits = weight.dtype in DTYPES and weight.shape[0] <= WIDEST_NORM
        return LaunchedNorm(weight, eps, formula) if fits else None
    functions = native(weight.dtype) if weight.device.type == "cpu" else None
    return None if functions is None else FusedNorm(functions, weight, eps, formula)


def _is_same(module: nn.Module, forward: Norm) -> bool:
    """On rows whose mean is not zero and whose scale differs, so that other kinds of norms stand out."""
    weight = forward.weight
    scale = torch.logspace(-2, 2, _ROWS, device=weight.device)[:, None]
    x = ((noise(_ROWS, weight.shape[0], like=weight.float()) + 0.5) * scale).to(weight.dtype)[None]
    return same_numbers(forward(x), module(x))

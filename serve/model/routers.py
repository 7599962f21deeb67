"""Routers behind adapters: modules that choose experts by a matrix of their own, which are no linear modules.

What a router makes of its matrix (softmax, top-k, normalisation) is its own: rows with another matrix go through its
forward over a copy of the module that holds that matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from onebase.adapters.base import Site, SiteKind
from onebase.kernels.ops.experts import RouterLowRank
from onebase.kernels.ops.instruction import wide
from onebase.serve.model.experts import Run, split_runs
from onebase.serve.model.hooks import CallRecorder
from onebase.serve.model.site_context import SiteContext
from onebase.serve.model.sites import Forward, ProbedBlock, forward_with


@dataclass(frozen=True, slots=True)
class ProbedRouter(ProbedBlock):
    """A router."""

    def adapted(self, context: SiteContext) -> Forward:
        return AdaptedRouter(self.module.forward, self, context)


@dataclass(frozen=True, slots=True, eq=False)
class AdaptedRouter:
    """Forward of a router: x [T, width] or [1, T, width] -> tensors of T rows each."""

    base: Forward
    entry: ProbedRouter
    context: SiteContext

    def __call__(self, x: Tensor) -> Any:
        placed = self.context.placed(self.entry.site.path)
        out = self.base(x)
        if not placed:
            return out
        tensors = [tensor.clone() for tensor in _tensors(out)]
        for run in split_runs(placed):
            rows = slice(run.start, run.stop)
            routed = forward_with(
                self.entry.module, {"weight": self._matrix(run)}, x[rows] if x.dim() == 2 else x[:, rows]
            )
            for tensor, part in zip(tensors, _tensors(routed), strict=True):
                tensor[rows] = part
        return tuple(tensors) if isinstance(out, tuple) else tensors[0]

    def _matrix(self, run: Run) -> Tensor:
        weight = self.entry.module.weight
        assert isinstance(weight, Tensor)
        terms = [item.op.matrix() * item.segment.scale for item in run.placed if isinstance(item.op, RouterLowRank)]
        return sum(terms, wide(weight)).to(weight.dtype)


def _tensors(out: Any) -> Sequence[Tensor]:
    return out if isinstance(out, tuple) else (out,)


class RouterCalls(CallRecorder):
    """Records, while it is entered, what every module that may be a router is called with."""

    def __init__(self, model: nn.Module) -> None:
        self._paths = {module: path for path, module in model.named_modules() if _may_route(module)}
        super().__init__(self._paths)

    def find(self, num_rows: int) -> tuple[list[ProbedRouter], dict[str, str]]:
        """Those that see each of num_rows tokens once and route a row whatever the others are, and path -> why the rest
        cannot be adapted."""
        found = [
            ProbedRouter(Site(path, SiteKind.ROUTER, module.weight.shape[1], module.weight.shape[0]), module)
            for module, path in self._paths.items()
            if isinstance(module.weight, Tensor) and _routes_rows(module, self._calls[module], num_rows)
        ]
        routers = {entry.module for entry in found}
        reason = "it has a matrix of its own, and is neither linear nor a router that sees every token once"
        self._calls.clear()
        return found, {path: reason for module, path in self._paths.items() if module not in routers}


def _may_route(module: nn.Module) -> bool:
    """It has a matrix ``weight``, and is neither of the kinds that have sites of their own nor a container."""
    weight = module._parameters.get("weight")
    plain = not isinstance(module, nn.Linear | nn.Embedding | Conv1D) and not list(module.children())
    return plain and weight is not None and weight.dim() == 2


@torch.inference_mode()
def _routes_rows(module: nn.Module, calls: list[tuple[Any, ...]], num_rows: int) -> bool:
    """Half of the rows alone give what they gave among all."""
    x = calls[0][0] if len(calls) == 1 and len(calls[0]) == 1 else None
    if not isinstance(x, Tensor) or x.dim() not in (2, 3) or x.numel() != num_rows * x.shape[-1]:
        return False
    half = num_rows // 2
    whole = _tensors(module(x))
    parts = _tensors(module(x[:half] if x.dim() == 2 else x[:, :half]))
    if not all(isinstance(tensor, Tensor) and tensor.dim() and len(tensor) == num_rows for tensor in whole):
        return False
    return all(
        torch.allclose(tensor[:half].float(), part.float(), rtol=1e-2, atol=1e-3)
        for tensor, part in zip(whole, parts, strict=True)
    )

"""Gated feed-forwards with one launch between their products: activation(gate) * up.

The three linear modules are called as before: adapters wrap their forwards. Which activation it is, and that the module
does nothing else, is tried on the module itself, which keeps its own forward otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from onebase.serve.model.trial import noise, replace_forwards, same_numbers

_ROWS = 16
_PARTS = ("gate_proj", "up_proj", "down_proj", "act_fn")


@dataclass(frozen=True, slots=True, eq=False)
class GatedForward:
    """Forward of one module. product: (gate, up) -> activation(gate) * up."""

    gate: nn.Module
    up: nn.Module
    down: nn.Module
    product: Callable[[Tensor, Tensor], Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.product(self.gate(x), self.up(x)))
        return y


def fuse_gated(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Put the fused forward in place of each module's that it gives the same numbers as; those are returned."""
    return replace_forwards(modules, _fused)


def _fused(module: nn.Module) -> GatedForward | None:
    parts: Any = [getattr(module, name, None) for name in _PARTS]
    weight = getattr(parts[0], "weight", None)
    if any(part is None for part in parts) or not isinstance(weight, Tensor):
        return None
    gate, up, down, activation = parts
    product = _product(activation, weight)
    width = getattr(gate, "in_features", None)
    if product is None or width is None:
        return None
    x, plain = noise(1, _ROWS, width, like=weight), GatedForward(gate, up, down, lambda g, u: activation(g) * u)
    return GatedForward(gate, up, down, product) if same_numbers(plain(x), module(x)) else None


def _product(activation: Callable[[Tensor], Tensor], weight: Tensor) -> Callable[[Tensor, Tensor], Tensor] | None:
    """In one launch, where the activation is a known one."""
    from onebase.kernels.fused import ACTIVATIONS, DTYPES, gated

    if weight.dtype not in DTYPES:
        return None
    gate, up = (4 * noise(_ROWS, 64, like=weight, seed=seed) for seed in (1, 2))
    expected = activation(gate) * up
    for kind in ACTIVATIONS:
        if same_numbers(gated(gate, up, kind), expected):
            return partial(gated, kind=kind)
    return None

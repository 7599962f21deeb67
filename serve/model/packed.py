"""Base weights in oneDNN's blocked layout: on a CPU a plain weight is rearranged again at every multiplication.

At the 16 rows of a decode step that costs as much as the multiplication itself. The plain twin is the module's own
forward; where the packed operators are missing it stays in place. The packed weight replaces the plain one, so that
the base is held once; ``dense`` gives it back bit by bit.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from onebase.kernels import prepack
from onebase.serve.model.quantised import is_quantised


class PackedLinear:
    """Forward of one linear module over its packed weight. x: [..., in_features] -> [..., out_features]."""

    __slots__ = ("_bias", "_weight")

    def __init__(self, module: nn.Linear) -> None:
        self._weight = prepack.prepack(module.weight.detach())
        self._bias = None if module.bias is None else module.bias.detach()

    def __call__(self, x: Tensor) -> Tensor:
        return prepack.product(x, self._weight, self._bias)

    def dense(self) -> Tensor:
        """The plain weight, [out_features, in_features]."""
        return self._weight.to_dense()


@torch.no_grad()
def pack_linears(modules: Iterable[nn.Module]) -> dict[nn.Module, PackedLinear]:
    """Pack every linear module and put its packed forward in place; the plain weight is let go."""
    packed: dict[nn.Module, PackedLinear] = {}
    for module in modules:
        if type(module) is not nn.Linear or is_quantised(module):
            continue
        if module.weight.device.type == "cpu" and prepack.supported(module.weight.dtype):
            packed[module] = PackedLinear(module)
            setattr(module, "forward", packed[module])  # noqa: B010  a method for the type checker
            module.weight = nn.Parameter(torch.empty_like(module.weight, device="meta"), requires_grad=False)
    return packed

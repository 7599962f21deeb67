"""Linear modules' products in steps of few rows: kernels/few_rows.py, by trial over the model's own weights."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from onebase.kernels.few_rows import Clock, FewRows
from onebase.serve.model.packed import PackedGroup, PackedLinear, Product, is_plain
from onebase.serve.model.trial import replace_forward


class ProductForward:
    """Forward of one linear module by another product than torch's linear."""

    __slots__ = ("_module", "_product")

    def __init__(self, module: nn.Linear, product: Product) -> None:
        self._module = module
        self._product = product

    def __call__(self, x: Tensor) -> Tensor:
        return self._product(x, self._module.weight, self._module.bias)


def use_few_rows(modules: Iterable[nn.Module], clock: Clock | None = None) -> None:
    """Put it in place: in the joint products of modules that have one, and in the other linear modules' forwards.

    To be called after join_linears and before adapters wrap the forwards.
    """
    groups: dict[PackedGroup, None] = {}
    single: list[nn.Linear] = []
    for module in modules:
        forward = module.__dict__.get("forward")
        if isinstance(forward, PackedLinear):
            groups[forward.group] = None
        elif isinstance(module, nn.Linear) and is_plain(module) and forward is None:
            single.append(module)
    weights = [*(group.weight for group in groups), *(module.weight.detach() for module in single)]
    product = FewRows.on(weights, clock).product
    for group in groups:
        group.use(product)
    for module in single:
        replace_forward(module, ProductForward(module, product))

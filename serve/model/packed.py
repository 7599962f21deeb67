"""Modules that read the same input (q, k and v; gate and up) share one product: their weights lie one below the other,
and each gets its columns of the output.

On a CPU weights also go into oneDNN's blocked layout: a plain one is rearranged again at every multiplication, which at
the 16 rows of a decode step costs as much as the multiplication itself. The packed weight replaces the plain one, so
that the base is held once; ``dense`` gives it back bit by bit. Elsewhere the modules' weights become views of the joint
one. The plain twin is the module's own forward; where the packed operators are missing it stays in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from onebase.kernels import prepack
from onebase.serve.model.quantised import is_quantised
from onebase.serve.model.trial import replace_forward

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # input, weight, bias


class PackedGroup:
    """One product for linear modules that are called one after the other with the same input.

    Whoever asks first has all outputs computed; each is handed out once, and the input is let go with the last one.
    """

    __slots__ = ("_bias", "_parts", "_product", "_sizes", "_source", "_weight")

    def __init__(self, modules: Sequence[nn.Linear], prepacked: bool) -> None:
        self._sizes = [module.out_features for module in modules]
        joint = torch.cat([module.weight.detach() for module in modules])
        self._weight = prepack.prepack(joint) if prepacked else joint
        self._product: Product = prepack.product if prepacked else linear
        self._bias = _joined_bias(modules)
        self._source: Tensor | None = None
        self._parts: list[Tensor | None] = []

    def output(self, x: Tensor, index: int) -> Tensor:
        """Of one module. x: [..., in_features] -> [..., out_features], a view where the group has several."""
        if len(self._sizes) == 1:
            return self._product(x, self._weight, self._bias)
        if not self._is_source(x) or self._parts[index] is None:
            self._parts = list(torch.split(self._product(x, self._weight, self._bias), self._sizes, dim=-1))
            self._source = x
        part, self._parts[index] = self._parts[index], None
        if index == len(self._sizes) - 1:
            self._source, self._parts = None, []
        assert part is not None
        return part

    def dense(self, index: int) -> Tensor:
        """The plain weight of one module, [out_features, in_features]."""
        dense: Tensor = self._weight.to_dense()
        return dense if len(self._sizes) == 1 else torch.split(dense, self._sizes)[index].clone()

    def views(self) -> tuple[Tensor, ...]:
        """The modules' weights, where the joint one is plain."""
        return torch.split(self._weight, self._sizes)

    @property
    def weight(self) -> Tensor:
        """The joint one, [all out_features, in_features]; opaque where it is prepacked."""
        return self._weight

    def use(self, product: Product) -> None:
        """Another body than torch's linear, where the joint weight is plain."""
        self._product = product

    def _is_source(self, x: Tensor) -> bool:
        """By its memory, which cannot be another's while it is held: callers may pass another view of it."""
        source = self._source
        return source is not None and x.data_ptr() == source.data_ptr() and x.shape == source.shape


class PackedLinear:
    """Forward of one linear module over its packed weight."""

    __slots__ = ("_group", "_index")

    def __init__(self, group: PackedGroup, index: int) -> None:
        self._group = group
        self._index = index

    def __call__(self, x: Tensor) -> Tensor:
        return self._group.output(x, self._index)

    @property
    def group(self) -> PackedGroup:
        """Whose product this is a part of."""
        return self._group

    def dense(self) -> Tensor:
        """The plain weight, [out_features, in_features]."""
        return self._group.dense(self._index)


@torch.no_grad()
def pack_linears(groups: Iterable[Sequence[nn.Module]]) -> dict[nn.Module, PackedLinear]:
    """Pack every linear module and put its packed forward in place; the plain weight is let go.

    groups: modules that read the same input, in the order in which the model calls them.
    """
    packed: dict[nn.Module, PackedLinear] = {}
    for modules in groups:
        linears = _packable(modules)
        if not linears:
            continue
        group = PackedGroup(linears, prepacked=True)
        for index, module in enumerate(linears):
            packed[module] = PackedLinear(group, index)
            replace_forward(module, packed[module])
            module.weight = nn.Parameter(torch.empty_like(module.weight, device="meta"), requires_grad=False)
    return packed


@torch.no_grad()
def join_linears(groups: Iterable[Sequence[nn.Module]]) -> list[nn.Module]:
    """One product for each group's linear modules, whose weights become views of the joint one; those are returned. On
    any device; at most one group's weights are held twice, and only meanwhile."""
    joined: list[nn.Module] = []
    for modules in groups:
        linears = [module for module in modules if isinstance(module, nn.Linear) and is_plain(module)]
        if len(linears) < 2 or len({(module.weight.dtype, module.weight.device) for module in linears}) > 1:
            continue
        group = PackedGroup(linears, prepacked=False)
        for index, (module, view) in enumerate(zip(linears, group.views(), strict=True)):
            module.weight = nn.Parameter(view, requires_grad=False)
            replace_forward(module, PackedLinear(group, index))
            joined.append(module)
    return joined


def _packable(modules: Sequence[nn.Module]) -> list[nn.Linear]:
    """The plain linear modules among them, all of the first one's type."""
    linears = [module for module in modules if isinstance(module, nn.Linear) and _is_packable(module)]
    return [module for module in linears if module.weight.dtype is linears[0].weight.dtype]


def _is_packable(module: nn.Linear) -> bool:
    return is_plain(module) and module.weight.device.type == "cpu" and prepack.supported(module.weight.dtype)


def is_plain(module: nn.Linear) -> bool:
    """Whether it is torch's own class over a weight as it is."""
    return type(module) is nn.Linear and not is_quantised(module)


def _joined_bias(modules: Sequence[nn.Linear]) -> Tensor | None:
    """Zeros for those that have none; None where nobody has one."""
    if all(module.bias is None for module in modules):
        return None
    parts = [module.weight.new_zeros(module.out_features) if module.bias is None else module.bias for module in modules]
    return torch.cat([part.detach() for part in parts])

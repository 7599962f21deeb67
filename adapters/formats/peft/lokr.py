"""PEFT's LOKR. Yeh et al., "LyCORIS" (2309.14859).

``y += s (W1 kron W2) x``, s = alpha / r whether or not a factor is of rank r itself. Either factor may be saved as a
product of two: the second where r is under half its larger side, and the first, with decompose_both, by the same rule.
PEFT drops factors that the config does not expect. The sizes of the factors are the tensors'; those of the product must
be the base's.
"""

from __future__ import annotations

from torch import Tensor

from onebase.adapters.base import BaseModel
from onebase.adapters.errors import AdapterRejected
from onebase.adapters.formats.files import AdapterFiles
from onebase.adapters.formats.reduce import Reducer
from onebase.adapters.formats.register import Compiled, register
from onebase.adapters.formats.saved import Beside, with_saved
from onebase.adapters.formats.targets import SiteTensors, ignore_training, read_alphas, read_ranks, sites_with
from onebase.adapters.program import SiteOps
from onebase.kernels.ops.kron import Kron

_SUFFIXES = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
_HARMLESS = (
    "decompose_factor",  # chose the sizes that the tensors have
    "module_dropout",
    "rank_dropout",
    "rank_dropout_scale",
    "use_effective_conv2d",
)


@register(
    "LOKR",
    title="LoKr",
    paper="2309.14859",
    covers=("LoKr", "KronA"),
    instructions=("Kron",),
    cost="4h^1.5 FLOPs, 2h elements for square factors",
)
def compile_lokr(files: AdapterFiles, base: BaseModel) -> Compiled:
    """Raises AdapterRejected naming the key or field."""
    fields = files.fields
    ignore_training(fields, *_HARMLESS)
    ranks, alphas, reducer = read_ranks(fields), read_alphas(fields), Reducer()
    both = fields.flag("decompose_both")
    ops: dict[str, SiteOps] = {}
    for tensors in sites_with(files, base, _SUFFIXES):
        path = tensors.site.path
        rank = ranks.at(path)
        _check_form(tensors, "lokr_w1", rank, may_be_two=both)
        _check_form(tensors, "lokr_w2", rank, may_be_two=True)
        ops[path] = SiteOps(extra=(_kron(tensors, rank, alphas.at(path) / rank, reducer),))
    return with_saved(ops, files, base, Beside(weight=True))


def _kron(tensors: SiteTensors, rank: int, scale: float, reducer: Reducer) -> Kron:
    site = tensors.site
    sizes = [_size(tensors, name) for name in ("lokr_w1", "lokr_w2")]
    (p, m), (q, n) = sizes
    if (p * q, m * n) != (site.out_features, site.in_features):
        raise AdapterRejected(
            f"The factors of {site.path} are {p} x {m} and {q} x {n}; their Kronecker product must be "
            f"{site.out_features} x {site.in_features}.",
            param=site.path,
        )
    reducer.spend(site.path, p * m + q * n)
    left, middle = _factor(tensors, "lokr_w1", sizes[0], rank)
    right, inner = _factor(tensors, "lokr_w2", sizes[1], rank)
    left = (left if middle is None else left @ middle) * scale
    if inner is not None and rank * (q + n) >= q * n:
        right, inner = right @ inner, None
    return Kron(left, right, inner)


def _check_form(tensors: SiteTensors, name: str, rank: int, *, may_be_two: bool) -> None:
    """Whether a factor is whole or the product of two, as the config has it."""
    is_two = may_be_two and rank < max(_size(tensors, name)) / 2
    if is_two is (name in tensors):
        form = "the product of two" if is_two else "whole"
        message = f"{name} of {tensors.site.path} must be {form} by r {rank}, its size and decompose_both."
        raise AdapterRejected(message, param="r")


def _size(tensors: SiteTensors, name: str) -> tuple[int, int]:
    """Rows and columns of a factor."""
    first, last = (name, name) if name in tensors else (f"{name}_a", f"{name}_b")
    shapes = tensors.shape(first), tensors.shape(last)
    if any(len(shape) != 2 for shape in shapes):
        raise AdapterRejected(f"The tensor {tensors.key(first)!r} must be a matrix.", param=tensors.key(first))
    return shapes[0][0], shapes[1][1]


def _factor(tensors: SiteTensors, name: str, size: tuple[int, int], rank: int) -> tuple[Tensor, Tensor | None]:
    """A factor whole, or as the two that it is the product of."""
    if name in tensors:
        return tensors.take(name, size, "the factor's"), None
    meaning = f"rank {rank} by r and rank_pattern"
    one = tensors.take(f"{name}_a", (size[0], rank), meaning)
    return one, tensors.take(f"{name}_b", (rank, size[1]), meaning)

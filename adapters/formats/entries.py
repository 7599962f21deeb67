"""Single entries of a site's weight: indices from a file, checked against it, and the Sparse instruction of them."""

from __future__ import annotations

import torch
from torch import Tensor

from onebase.adapters.base import Site
from onebase.adapters.errors import AdapterRejected
from onebase.adapters.formats.files import TensorBag
from onebase.adapters.formats.keys import check_shape
from onebase.kernels.ops.sparse import Sparse, compress


def take_indices(key: str, tensors: TensorBag, shape: tuple[int, ...], bounds: tuple[int, ...], meaning: str) -> Tensor:
    """Indices as int64. bounds: what they must stay under, one for each line of the tensor, or one for all.

    Also read as float32, as PEFT writes them on Windows. Raises AdapterRejected where one is out of bounds.
    """
    check_shape(key, tensors, shape, meaning)
    if tensors.dtype(key) is torch.float32:
        raw = tensors.take(key)
        if not torch.equal(raw, raw.round()) or bool((raw.abs() >= 1 << 24).any()):
            raise AdapterRejected(f"The tensor {key!r} has indices that are no whole numbers below 2^24.", param=key)
    else:
        raw = tensors.take_integers(key)
    indices = raw.long()
    for line, bound in zip(indices.view(len(bounds), -1), bounds, strict=True):
        if bool(((line < 0) | (line >= bound)).any()):
            raise AdapterRejected(f"The tensor {key!r} has indices outside 0 to {bound - 1}.", param=key)
    return indices


def sparse(site: Site, rows: Tensor, columns: Tensor, values: Tensor) -> Sparse:
    """values [n] float32 added to a site's weight at rows and columns [n]; equal places add up."""
    return Sparse(*compress(rows, columns, values, site.out_features))


def sparse_flat(site: Site, places: Tensor, values: Tensor) -> Sparse:
    """The same for places in the flattened weight."""
    return sparse(site, places // site.in_features, places % site.in_features, values)

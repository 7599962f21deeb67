"""LORA's two factors as the file has them, expanded where a variant stores less than the whole matrix."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from onebase.adapters.base import Site, SiteKind
from onebase.adapters.errors import AdapterRejected
from onebase.adapters.formats.fields import refused
from onebase.adapters.formats.files import TensorBag
from onebase.adapters.formats.keys import check_shape
from onebase.adapters.formats.peft.lora_settings import LoraSettings, Variant

A, B = "lora_A.weight", "lora_B.weight"
TOKEN_A, TOKEN_B = "lora_embedding_A", "lora_embedding_B"


def take_factors(
    site: Site, keys: Mapping[str, str], tensors: TensorBag, settings: LoraSettings, rank: int
) -> tuple[Tensor, Tensor]:
    """a: [rank, in_features], b: [out_features, rank]."""
    suffixes = (TOKEN_A, TOKEN_B) if site.kind is SiteKind.EMBEDDING else (A, B)
    key_a, key_b = (require(keys, suffix, site) for suffix in suffixes)
    side = settings.blocks.side(site.path) if settings.blocks else ""
    count = settings.blocks.count if settings.blocks and side else 1
    cut_a, cut_b = (count if side == "a" else settings.group), (count if side == "b" else 1)
    _check_cuts(site, rank, settings, side, count)
    meaning = f"rank {rank} by r and rank_pattern, {site.in_features} in, {site.out_features} out"
    check_shape(key_a, tensors, (rank, site.in_features // cut_a), meaning)
    check_shape(key_b, tensors, (site.out_features, rank // cut_b), meaning)
    a, b = tensors.take(key_a), tensors.take(key_b)
    if settings.variant is Variant.QUANTIZED:
        return _ungrouped(a, settings.group), b
    return _diagonal(a, cut_a), _diagonal(b, cut_b)


def require(keys: Mapping[str, str], suffix: str, site: Site) -> str:
    """The key of a tensor that the site has to have. Raises AdapterRejected."""
    if suffix in keys:
        return keys[suffix]
    present = next(iter(keys.values()))
    raise AdapterRejected(
        f"{site.path} ({site.kind}) needs a tensor {suffix!r}, and has only {present!r} and its like: "
        "half an adapter is refused.",
        param=present,
    )


def _check_cuts(site: Site, rank: int, settings: LoraSettings, side: str, count: int) -> None:
    width = site.in_features if side == "a" else site.out_features
    if rank % count or width % count:
        raise refused(
            "use_bdlora.nblocks", count, f"it must divide rank {rank} and the {width} features of {site.path}"
        )
    if site.in_features % settings.group:
        reason = f"it must divide the {site.in_features} inputs of {site.path}"
        raise refused("qalora_group_size", settings.group, reason)


def _diagonal(factor: Tensor, count: int) -> Tensor:
    """[m, n / count] -> [m, n]: ``count`` blocks on the diagonal (BD-LoRA)."""
    if count == 1:
        return factor
    rows, columns = len(factor) // count, factor.shape[1]
    whole = factor.new_zeros(len(factor), columns * count)
    for block in range(count):
        at = slice(block * rows, (block + 1) * rows)
        whole[at, block * columns : (block + 1) * columns] = factor[at]
    return whole


def _ungrouped(a: Tensor, group: int) -> Tensor:
    """QALoRA's A [rank, in / g] reads means of g inputs, times in / g. Xu et al., "QA-LoRA" (2309.14717)."""
    return a.float().repeat_interleave(group, dim=1) * (a.shape[1] / group)

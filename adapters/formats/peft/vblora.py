"""PEFT's VBLORA. Li et al., "VB-LoRA" (2405.15179).

Both factors of a low-rank delta are cut into pieces of vector_length, and each piece is a mixture of vectors of a bank
that the whole adapter shares: of the topk with the largest logits, by their softmax. The file has the logits, or (with
save_only_topk_weights) the topk indices and all their weights but the last.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from onebase.adapters.base import BaseModel
from onebase.adapters.errors import AdapterRejected
from onebase.adapters.formats.fields import MAX_RANK, Fields
from onebase.adapters.formats.files import AdapterFiles
from onebase.adapters.formats.keys import check_shape
from onebase.adapters.formats.reduce import Reducer
from onebase.adapters.formats.register import Compiled, register
from onebase.adapters.formats.saved import Beside, with_saved
from onebase.adapters.formats.targets import SiteTensors, ignore_training, sites_with, take_global
from onebase.adapters.program import SiteOps

_A, _B = "vblora_logits_A", "vblora_logits_B"
_INDICES, _WEIGHTS = "_topk_indices", "_topk_weights"
_MAX_VECTORS, _MAX_LENGTH, _MAX_TOPK = 1 << 24, 1 << 20, 256
_ROUNDING = 1e-4


@dataclass(frozen=True, slots=True)
class VectorBank:
    """vectors: [num_vectors, vector_length]."""

    vectors: Tensor
    topk: int
    only_topk: bool

    def mix(self, indices: Tensor, weights: Tensor) -> Tensor:
        """[.., topk] each -> [.., vector_length], one of the topk at a time."""
        mixed = torch.zeros(*indices.shape[:-1], self.vectors.shape[1])
        for k in range(self.topk):
            mixed += weights[..., k, None] * self.vectors[indices[..., k]]
        return mixed


@register(
    "VBLORA",
    title="VB-LoRA",
    paper="2405.15179",
    covers=("VB-LoRA",),
    instructions=("LowRank",),
    cost="4hr FLOPs, 2hr elements",
    note="logits, or only the topk weights; mixed at load",
)
def compile_vblora(files: AdapterFiles, base: BaseModel) -> Compiled:
    """Raises AdapterRejected naming the key or field."""
    ignore_training(files.fields, "init_logits_std", "init_vector_bank_bound", "vblora_dropout")
    rank = files.fields.integer("r", 1, MAX_RANK)
    bank = _bank(files, files.fields)
    reducer = Reducer()
    suffixes = [f"{name}{end}" for name in (_A, _B) for end in ("", _INDICES, _WEIGHTS)]
    sites = sites_with(files, base, suffixes)
    ops = {s.site.path: _site_ops(s, rank, bank, reducer) for s in sites}
    return with_saved(ops, files, base, Beside(weight=True))


def _bank(files: AdapterFiles, fields: Fields) -> VectorBank:
    count = fields.integer("num_vectors", 1, _MAX_VECTORS)
    length = fields.integer("vector_length", 1, _MAX_LENGTH)
    topk = fields.integer("topk", 1, min(_MAX_TOPK, count))
    vectors = take_global(files.tensors, "vblora_vector_bank", (count, length), "num_vectors, vector_length")
    return VectorBank(vectors, topk, fields.flag("save_only_topk_weights"))


def _site_ops(tensors: SiteTensors, rank: int, bank: VectorBank, reducer: Reducer) -> SiteOps:
    site, length = tensors.site, bank.vectors.shape[1]
    if site.in_features % length or site.out_features % length:
        message = (
            f"vector_length is {length}; it must divide {site.in_features} and {site.out_features} of {site.path}."
        )
        raise AdapterRejected(message, param="vector_length")
    a = _mixed(tensors, _A, (rank, site.in_features // length), bank)  # [rank, pieces, length]
    b = _mixed(tensors, _B, (site.out_features // length, rank), bank)  # [pieces, rank, length]
    return reducer.product(site, a.flatten(1), b.transpose(0, 1).flatten(1))


def _mixed(tensors: SiteTensors, name: str, pieces: tuple[int, int], bank: VectorBank) -> Tensor:
    """[*pieces, vector_length]."""
    if bank.only_topk:
        return bank.mix(*_saved_topk(tensors, name, pieces, bank))
    count = len(bank.vectors)
    logits, indices = tensors.take(name, (*pieces, count), f"num_vectors is {count}").topk(bank.topk, dim=-1)
    return bank.mix(indices, torch.softmax(logits, dim=-1))


def _saved_topk(tensors: SiteTensors, name: str, pieces: tuple[int, int], bank: VectorBank) -> tuple[Tensor, Tensor]:
    key = tensors.key(f"{name}{_INDICES}")
    check_shape(key, tensors.bag, (*pieces, bank.topk), f"topk is {bank.topk}")
    indices = tensors.bag.take_integers(key).long()
    if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < len(bank.vectors):
        raise AdapterRejected(f"The tensor {key!r} must hold numbers from 0 to {len(bank.vectors) - 1}.", param=key)
    if bool((indices.sort(dim=-1).values.diff(dim=-1) == 0).any()):
        raise AdapterRejected(f"The tensor {key!r} names a vector twice in one mixture.", param=key)
    weights = tensors.take(f"{name}{_WEIGHTS}", (*pieces, bank.topk - 1), "topk - 1: the last one makes the sum one")
    last = 1 - weights.sum(dim=-1, keepdim=True)
    if bool((weights < 0).any()) or bool((last < -_ROUNDING).any()):
        key = tensors.key(f"{name}{_WEIGHTS}")
        raise AdapterRejected(f"The tensor {key!r} holds no weights: they are negative, or sum to over one.", param=key)
    return indices, torch.cat([weights, last.clamp(min=0)], dim=-1)

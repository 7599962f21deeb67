"""What an adapter's compiler may know of the base model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from torch import Tensor


class SiteKind(StrEnum):
    """What the base module computes. Conv1D (GPT-2) counts as LINEAR: only its storage is transposed."""

    LINEAR = "linear"
    EMBEDDING = "embedding"


@dataclass(frozen=True, slots=True)
class Site:
    """A module of the base model that an adapter can touch.

    ``path`` is its module path in the loaded model, e.g. ``model.layers.0.self_attn.q_proj``.
    For an EMBEDDING ``in_features`` is the vocabulary size and ``out_features`` the width; ``output_scale`` is what
    its forward multiplies rows by (Gemma 3's scaled word embedding), and so what an added row must be multiplied by.
    """

    path: str
    kind: SiteKind
    in_features: int
    out_features: int
    output_scale: float = 1.0


class BaseModel(Protocol):
    """The frozen base as the compiler sees it."""

    @property
    def sites(self) -> Mapping[str, Site]:
        """Every adaptable module by module path."""

    @property
    def refused(self) -> Mapping[str, str]:
        """Modules that exist but cannot be adapted -> the reason (say: it does not see every token)."""

    @property
    def fingerprint(self) -> str:
        """Digest of the base's config and weights; equal bases have equal fingerprints."""

    def weight(self, path: str) -> Tensor:
        """The weight of a site as [out_features, in_features] (EMBEDDING: [vocabulary, width]), as multiplied."""

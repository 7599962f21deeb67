"""What an adapter's compiler may know of the base model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from torch import Tensor


class SiteKind(StrEnum):
    """What the base module computes. Conv1D (GPT-2) counts as LINEAR: only its storage is transposed.

    LAYER is a whole decoder layer, ATTENTION its attention module with its projections, MLP its whole feed-forward
    module. EXPERTS is a module of routed experts whose weights are stacked in 3-D parameters, ROUTER one that chooses
    experts by a matrix of its own.
    """

    LINEAR = "linear"
    EMBEDDING = "embedding"
    NORM = "norm"
    LAYER = "layer"
    ATTENTION = "attention"
    MLP = "mlp"
    EXPERTS = "experts"
    ROUTER = "router"


@dataclass(frozen=True, slots=True)
class Site:
    """A module of the base model that an adapter can touch.

    ``path`` is its module path in the loaded model, e.g. ``model.layers.0.self_attn.q_proj``.
    For an EMBEDDING ``in_features`` is the vocabulary size and ``out_features`` the width; ``output_scale`` is what
    its forward multiplies rows by (Gemma 3's scaled word embedding), and so what an added row must be multiplied by.
    NORM, LAYER, ATTENTION, MLP and EXPERTS have the same width on both sides;
    a ROUTER's out_features is the number of experts.
    """

    path: str
    kind: SiteKind
    in_features: int
    out_features: int
    output_scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Layer:
    """A decoder layer. attention and mlp: paths of its ATTENTION and MLP sites; mlp is None where there is no module
    that is the whole feed-forward block. path: of its LAYER site, None where no module is the layer.

    num_heads, num_kv_heads, head_dim: of its attention. scaling: what its logits are multiplied by.
    """

    attention: str
    mlp: str | None
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scaling: float
    path: str | None = None


@dataclass(frozen=True, slots=True)
class ExpertParameter:
    """A parameter of an EXPERTS site: ``num_experts`` matrices of out_features x in_features under one name.

    transposed: stored as [experts, in_features, out_features].
    """

    name: str
    in_features: int
    out_features: int
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class Experts:
    """An EXPERTS site. up, down: what a token goes through, in this order. per_token: experts that one token takes.

    parameters: names of all its own parameters, in the order in which the module declares them. interleaved: gate and
    up take turns among the features of ``up``; else one comes after the other.
    """

    num_experts: int
    per_token: int
    up: ExpertParameter
    down: ExpertParameter
    parameters: tuple[str, ...]
    interleaved: bool = False


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

    @property
    def layers(self) -> Sequence[Layer]:
        """Every decoder layer with attention, in order."""

    @property
    def experts(self) -> Mapping[str, Experts]:
        """Every EXPERTS site by its path."""

    @property
    def config(self) -> Mapping[str, Any]:
        """The text part of the base's configuration, as transformers' ``to_dict`` has it."""

    def weight(self, path: str) -> Tensor:
        """The weight of a site as multiplied: LINEAR and ROUTER [out_features, in_features], EMBEDDING
        [vocabulary, width], NORM [width]. On the device of the base, in its dtype."""

    def bias(self, path: str) -> Tensor | None:
        """The bias of a LINEAR or NORM site, [out_features], or None."""

    def tied(self, path: str) -> tuple[str, ...]:
        """The other sites that hold the same weight (an embedding and the output head, say)."""

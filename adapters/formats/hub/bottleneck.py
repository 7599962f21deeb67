"""AdapterHub's bottlenecks on decoders that normalise before their blocks.

With m the output of an attention or feed-forward block, r the residual stream that it joins, f(z) = up(act(down z)):

    r + m + s f(m)        Houlsby (1902.00751), double_seq_bn: original_ln_before is false
    r + m + s f(m + r)    Pfeiffer (2005.00247), seq_bn; AdapterPlus (2406.06820): s per channel
    r + m + s f(r)        parallel (2110.04366), par_bn

The library adds r where original_ln_after says so, or takes it up before the adapter and keeps it where
residual_before_ln says so; other combinations would lose r or add it twice, and are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from onebase.adapters.errors import AdapterRejected
from onebase.adapters.formats.activations import take_activation
from onebase.adapters.formats.fields import MAX_RANK, Fields, as_number, refused
from onebase.adapters.formats.hub.keys import Group, HubFile
from onebase.adapters.formats.hub.phm import PhmLayer, PhmSettings, read_phm
from onebase.adapters.program import SiteOps
from onebase.kernels.ops.bottleneck import BlockBottleneck, Reads

# Decoders for which the library's own code puts r and m where the formulas above have them.
SERVED_MODELS = ("gpt2", "llama", "mistral")
PLACES = {"attention_adapters": "mh_adapter", "output_adapters": "output_adapter"}
Scaling = float | Literal["learned", "channel"]

_HARMLESS = (
    "adapter_residual_before_ln",  # with ln_after, which is refused
    "cross_adapter",  # of encoder-decoders
    "dropout",
    "hypercomplex_nonlinearity",
    "init_weights",
    "init_weights_seed",
    "inv_adapter_reduction_factor",
    "learn_phm",
    "phm_c_init",
    "phm_init_range",
    "stochastic_depth",
)
_UNSERVED = {
    "inv_adapter": "invertible adapters change the embeddings and undo it before the head; they are not served",
    "invertible_adapter": "invertible adapters change the embeddings and undo it before the head; they are not served",
    "ln_after": "a layer norm of its own behind the adapter is not served",
    "ln_before": "a layer norm of its own before the adapter is not served",
    "use_gating": "a gate that averages over the whole sequence depends on tokens that are yet to come (UniPELT)",
}
_OLD_GELU = {"gelu": "gelu_new", "gelu_orig": "gelu"}
_ONCE = "the residual stream would be lost or added twice"


@dataclass(frozen=True, slots=True)
class BottleneckSettings:
    """One bottleneck configuration. places: keys of PLACES; reduction: width / rank, by layer where it is a table."""

    places: frozenset[str]
    left_out: frozenset[int]
    reads: Reads
    activation: str
    reduction: float | Mapping[str, float]
    scaling: Scaling
    phm: PhmSettings | None

    def covers(self, layer: int, place: str) -> bool:
        return place in self.places and layer not in self.left_out

    def rank(self, layer: int, width: int) -> int:
        """As the library computes it. Raises AdapterRejected where the table has nothing for the layer."""
        factor = self.reduction
        if isinstance(factor, Mapping):
            value = factor.get(str(layer), factor.get("default"))
            if value is None:
                reason = f"reduction_factor has neither layer {layer} nor a default."
                raise AdapterRejected(reason, param="reduction_factor")
            factor = value
        return max(1, int(min(width // factor, MAX_RANK + 1)))


def read_bottleneck(fields: Fields, *, old_names: bool) -> BottleneckSettings:
    """old_names: a file of adapter-transformers 1, which called gelu_new gelu. Raises AdapterRejected."""
    fields.ignore(_HARMLESS)
    fields.must_be_unset(_UNSERVED)
    return BottleneckSettings(
        places=frozenset(place for place, name in PLACES.items() if fields.flag(name)),
        left_out=read_left_out(fields),
        reads=_read_reads(fields),
        activation=take_activation(fields, "non_linearity", "identity", _OLD_GELU if old_names else {}),
        reduction=_read_reduction(fields),
        scaling=_read_scaling(fields),
        phm=read_phm(fields),
    )


def read_left_out(fields: Fields) -> frozenset[int]:
    value = fields.take("leave_out", [])
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        raise refused("leave_out", value, "it must be a list of layer numbers")
    return frozenset(item for item in value if type(item) is int)


def _read_reads(fields: Fields) -> Reads:
    parallel = fields.flag("is_parallel")
    before, after = fields.flag("original_ln_before"), fields.flag("original_ln_after", default=True)
    kept = fields.choice("residual_before_ln", (True, False), True, "true and false are served")
    if parallel:
        if not after:
            raise refused("original_ln_after", False, _ONCE)
        return "residual"
    if after is (before and not kept):
        raise refused("original_ln_after", after, _ONCE)
    return "sum" if before else "output"


def _read_reduction(fields: Fields) -> float | Mapping[str, float]:
    value = fields.take("reduction_factor")
    table = value if isinstance(value, dict) else {"": value}
    found = {key: as_number("reduction_factor", item) for key, item in table.items()}
    for factor in found.values():
        if factor <= 0:
            raise refused("reduction_factor", value, "it must be above 0")
    return found if isinstance(value, dict) else found[""]


def _read_scaling(fields: Fields) -> Scaling:
    value = fields.take("scaling", 1.0)
    if value == "learned":
        return "learned"
    return "channel" if value == "channel" else as_number("scaling", value)


def compile_bottlenecks(file: HubFile, settings: Sequence[BottleneckSettings]) -> dict[str, SiteOps]:
    """The adapters of every layer and place that one of the configurations covers. Raises AdapterRejected."""
    model_type = file.base.config.get("model_type")
    if model_type not in SERVED_MODELS:
        raise AdapterRejected(
            f"AdapterHub's bottlenecks are not served on {model_type!r} (on {', '.join(SERVED_MODELS)}): where "
            "the library puts them differs between architectures.",
            param="config",
        )
    groups = _by_place(file)
    ops: dict[str, SiteOps] = {}
    for index, layer in enumerate(file.base.layers):
        for place, path in (("attention_adapters", layer.attention), ("output_adapters", layer.mlp)):
            covering = [item for item in settings if item.covers(index, place)]
            if len(covering) > 1:
                raise AdapterRejected(
                    f"Two configurations put an adapter into {place} of layer {index}.", param="config"
                )
            if covering and path is not None:
                ops[path] = _compile_one(file, groups.get((index, place), {}), covering[0], index, path)
    return ops


def _by_place(file: HubFile) -> dict[tuple[int, str], Group]:
    groups: dict[tuple[int, str], Group] = {}
    for module, group in file.groups("adapters").items():
        path, _, place = module.rpartition(".")
        if place in PLACES:
            groups[file.layer_of(next(iter(group.values())), path), place] = group
    return groups


def _compile_one(file: HubFile, group: Group, settings: BottleneckSettings, layer: int, path: str) -> SiteOps:
    if not group:
        raise AdapterRejected(f"The config puts an adapter on {path}, and no tensor is there.", param=path)
    width = file.base.sites[path].out_features
    rank = settings.rank(layer, width)
    if rank > MAX_RANK:
        reason = f"reduction_factor makes the bottleneck of {path} over {MAX_RANK} wide."
        raise AdapterRejected(reason, param="reduction_factor")
    down, down_bias = _projection(file, group, settings, ("adapter_down.0", "down", path), width, rank)
    up, up_bias = _projection(file, group, settings, ("adapter_up", "up", path), rank, width)
    scale = _scale(file, group, settings.scaling, width, path)
    op = BlockBottleneck(down, up, scale, down_bias, up_bias, settings.activation, settings.reads)
    return SiteOps(extra=(op,))


def _projection(
    file: HubFile, group: Group, settings: BottleneckSettings, name: tuple[str, str, str], width: int, out: int
) -> tuple[Tensor, Tensor | None]:
    """weight: [out, width], bias: [out]. name: prefix of its keys, its position, and the block."""
    prefix, position, path = name
    if settings.phm is not None:
        return PhmLayer(file, group, settings.phm, prefix, position, path).dense(width, out)
    weight = file.take(group, f"{prefix}.weight", (out, width), path)
    return weight, file.take(group, f"{prefix}.bias", (out,), path)


def _scale(file: HubFile, group: Group, scaling: Scaling, width: int, path: str) -> Tensor:
    """[1] or [width]"""
    if isinstance(scaling, float):
        return torch.tensor([scaling])
    return file.take(group, "scaling", (1,) if scaling == "learned" else (width,), path)

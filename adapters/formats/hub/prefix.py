"""AdapterHub's prefix tuning. Li and Liang (2101.00190).

Keys and values of every layer, stored flat or as an embedding behind a small network, which is run once at load. They
stand before the sequence without rotation, and the first real token has position 0 (PEFT's has the prefix's length).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from onebase.adapters.errors import AdapterRejected
from onebase.adapters.formats.activations import take_activation
from onebase.adapters.formats.fields import MAX_RANK, Fields, refused
from onebase.adapters.formats.hub.bottleneck import SERVED_MODELS, read_left_out
from onebase.adapters.formats.hub.keys import HubFile
from onebase.adapters.formats.register import Compiled
from onebase.adapters.program import SiteOps
from onebase.kernels.ops.bottleneck import ACTIVATIONS
from onebase.kernels.ops.prefix import KvPrefix

MAX_PREFIX = 4096
_HARMLESS = ("cross_prefix", "dropout", "encoder_prefix", "init_weights_seed", "shared_gating")
_GATING = "a gate that averages over the whole sequence depends on tokens that are yet to come (UniPELT)"
_PLACE = "self_prefix."


@dataclass(frozen=True, slots=True)
class PrefixSettings:
    length: int
    hidden: int | None  # width of the network; None where the prefix is stored flat
    activation: str


def read_prefix(fields: Fields) -> PrefixSettings:
    """Raises AdapterRejected naming the field."""
    fields.ignore(_HARMLESS)
    fields.must_be_unset({"use_gating": _GATING})
    if left_out := read_left_out(fields):
        raise refused("leave_out", [*left_out], "every layer holds as many slots, so a prefix is in all or none")
    length = fields.integer("prefix_length", 1, MAX_PREFIX)
    hidden = fields.integer("bottleneck_size", 1, 4 * MAX_RANK)
    activation = take_activation(fields, "non_linearity", "tanh")
    return PrefixSettings(length, None if fields.flag("flat") else hidden, activation)


def compile_prefix(file: HubFile, settings: PrefixSettings) -> Compiled:
    """Raises AdapterRejected where the base does not fit, or naming the key."""
    layers = file.base.layers
    _check_base(file)
    heads, width = layers[0].num_heads, layers[0].head_dim
    flat = _stored(file, settings, 2 * len(layers) * heads * width)
    table = flat.view(settings.length, len(layers), 2, heads, width)
    ops = {
        layer.attention: SiteOps(extra=(KvPrefix(table[:, at, 0].contiguous(), table[:, at, 1].contiguous()),))
        for at, layer in enumerate(layers)
    }
    return Compiled(ops, num_virtual_tokens=settings.length, first_position=0)


def _check_base(file: HubFile) -> None:
    model_type = file.base.config.get("model_type")
    if model_type not in SERVED_MODELS:
        reason = f"only {', '.join(SERVED_MODELS)} are served"
    elif any(layer.num_heads != layer.num_kv_heads for layer in file.base.layers):
        reason = "the library makes a prefix for every query head, which grouped queries cannot take"
    elif file.base.config.get("sliding_window"):
        reason = "it attends within a window, which the library's prefix ignores"
    else:
        return
    raise AdapterRejected(f"AdapterHub's prefixes are not served on this {model_type!r}: {reason}.", param="config")


def _take_once(file: HubFile, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The prefix's tensors by name. The library may save them again under every layer: copies have to be equal."""
    groups = list(file.groups("prefix_tunings").values())
    if not groups:
        raise AdapterRejected(f"The config has a prefix; no tensor is named prefix_tunings.{file.name}.", param="files")
    first = {name: file.take(groups[0], f"{_PLACE}{name}", shape, "the prefix") for name, shape in shapes.items()}
    for group in groups[1:]:
        for name, shape in shapes.items():
            key = group.get(f"{_PLACE}{name}", "")
            if not torch.equal(file.take(group, f"{_PLACE}{name}", shape, "a copy of the prefix"), first[name]):
                raise AdapterRejected(f"The tensor {key!r} differs from another copy of the prefix.", param=key)
    return first


def _stored(file: HubFile, settings: PrefixSettings, columns: int) -> Tensor:
    """[length, columns]"""
    length, hidden = settings.length, settings.hidden
    if hidden is None:
        return _take_once(file, {"control_trans": (length * columns,)})["control_trans"].view(length, columns)
    width = file.base.sites[file.base.layers[0].attention].in_features
    shapes = {
        "wte.weight": (length, width),
        "control_trans.0.weight": (hidden, width),
        "control_trans.0.bias": (hidden,),
        "control_trans.2.weight": (columns, hidden),
        "control_trans.2.bias": (columns,),
    }
    rows, first, first_bias, second, second_bias = _take_once(file, shapes).values()
    inner = ACTIVATIONS[settings.activation](linear(rows, first, first_bias))
    return linear(inner, second, second_bias)

"""The bottlenecks of LLM-Adapters (Hu et al., 2304.01933), peft_type BOTTLENECK: AdapterH, AdapterP and Parallel.

f(x) = s up(act(down x)), without biases. Beside any linear module (parallel): y + f(x). In series, the library's table
of architectures says where: before the first projections of a feed-forward block, W (x + f(x)); behind its last one,
y + f(y). The file does not say which, so only the table's architectures are served in series. AdapterP has the last
one only: its tensors say so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from onebase.adapters.base import BaseModel, Site, SiteKind
from onebase.adapters.errors import AdapterRejected
from onebase.adapters.formats.activations import take_activation
from onebase.adapters.formats.fields import MAX_RANK, Fields, as_number
from onebase.adapters.formats.files import AdapterFiles, TensorBag
from onebase.adapters.formats.keys import check_shape, group_by_site
from onebase.adapters.formats.register import Compiled, register
from onebase.adapters.formats.saved import merged, replaced, take_copies
from onebase.adapters.program import SiteOps
from onebase.kernels.ops.bottleneck import InputBottleneck, OutputBottleneck, ParallelBottleneck, RowBottleneck

DOWN, UP, SCALING, BIAS = "adapter_down.weight", "adapter_up.weight", "adapter_scaling", "bias"

_HARMLESS = ("adapter_dropout", "init_weights", "target_modules", "use_adapterp")
_IN_SERIES: Mapping[str, Mapping[str, type[RowBottleneck]]] = {
    "bloom": {"dense_h_to_4h": InputBottleneck, "dense_4h_to_h": OutputBottleneck},
    "gptj": {"fc_in": InputBottleneck, "fc_out": OutputBottleneck},
    "llama": {"gate_proj": InputBottleneck, "up_proj": InputBottleneck, "down_proj": OutputBottleneck},
    "opt": {"fc1": InputBottleneck, "fc2": OutputBottleneck},
}


@dataclass(frozen=True, slots=True)
class BottleneckSettings:
    """scaling: None where every module has learned its own."""

    rank: int
    activation: str
    scaling: float | None
    parallel: bool


@register(
    "BOTTLENECK",
    title="LLM-Adapters bottlenecks",
    paper="2304.01933",
    covers=("AdapterH", "AdapterP", "Parallel Adapter"),
    instructions=("InputBottleneck", "OutputBottleneck", "ParallelBottleneck", "AddOut"),
    cost="4hr FLOPs, 2hr elements",
    note=f"in series on {', '.join(sorted(_IN_SERIES))}; in parallel on every linear module",
)
def compile_bottleneck(files: AdapterFiles, base: BaseModel) -> Compiled:
    """Raises AdapterRejected naming the key or field."""
    settings = _read_settings(files.fields)
    ops: dict[str, SiteOps] = {}
    for path, keys in group_by_site(files.tensors, base, (DOWN, UP, SCALING, BIAS)).items():
        site = base.sites[path]
        bias = {BIAS: keys.pop(BIAS)} if BIAS in keys else {}
        op = SiteOps(extra=(_compile_one(site, keys, files.tensors, settings, base),)) if keys else SiteOps()
        if bias and any(isinstance(item, OutputBottleneck) for item in op.extra):
            message = f"{path} has an adapter that reads its output, and another bias: that is not served."
            raise AdapterRejected(message, param=bias[BIAS])
        op = merged(op, replaced(site, take_copies(site, bias, files.tensors, base), base)) if bias else op
        if any(True for _ in op.tensors()):
            ops[path] = op
    return Compiled(ops)


def _read_settings(fields: Fields) -> BottleneckSettings:
    fields.ignore(_HARMLESS)
    fields.must_be_unset({"modules_to_save": "full copies of modules are not served for this family"})
    fields.choice("bias", ("none", "all", "adapter_only"), "none", "it must be 'none', 'all' or 'adapter_only'")
    scaling = fields.take("scaling", 1.0)
    return BottleneckSettings(
        rank=fields.integer("bottleneck_size", 1, MAX_RANK),
        activation=take_activation(fields, "non_linearity", "tanh"),
        scaling=None if scaling == "learned" else as_number("scaling", scaling),
        parallel=fields.flag("use_parallel_adapter"),
    )


def _compile_one(
    site: Site, keys: Mapping[str, str], tensors: TensorBag, settings: BottleneckSettings, base: BaseModel
) -> RowBottleneck:
    kind = _kind(site, keys, settings, base)
    width = site.out_features if kind is OutputBottleneck else site.in_features
    out = site.in_features if kind is InputBottleneck else site.out_features
    down = _take(site, keys, DOWN, tensors, (settings.rank, width))
    up = _take(site, keys, UP, tensors, (out, settings.rank))
    learned = settings.scaling is None
    scale = _take(site, keys, SCALING, tensors, (1,)) if learned else torch.tensor([settings.scaling])
    return kind(down, up, scale, activation=settings.activation)


def _kind(site: Site, keys: Mapping[str, str], settings: BottleneckSettings, base: BaseModel) -> type[RowBottleneck]:
    key = next(iter(keys.values()))
    if site.kind is not SiteKind.LINEAR:
        raise AdapterRejected(f"The tensor {key!r} adapts {site.path}, which is no linear module.", param=key)
    if settings.parallel:
        return ParallelBottleneck
    places = _IN_SERIES.get(str(base.config.get("model_type")), {})
    kind = places.get(site.path.rpartition(".")[2])
    if kind is None:
        known = ", ".join(f"{model} ({', '.join(names)})" for model, names in _IN_SERIES.items())
        message = f"{site.path}: LLM-Adapters has no place for an adapter in series here; it has them on {known}."
        raise AdapterRejected(message, param=key)
    return kind


def _take(site: Site, keys: Mapping[str, str], suffix: str, tensors: TensorBag, shape: tuple[int, ...]) -> Tensor:
    if suffix not in keys:
        present = next(iter(keys.values()))
        message = f"{site.path} needs a tensor {suffix!r}, and has only {present!r} and its like."
        raise AdapterRejected(message, param=present)
    check_shape(keys[suffix], tensors, shape, f"by bottleneck_size and {site.path}")
    return tensors.take(keys[suffix]).float()

"""Which modules of a base get a faster body than their own forward: those where a trial finds the same numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn
from transformers import PreTrainedModel

from onebase.serve.model.attention import AttentionContext
from onebase.serve.model.gated import fuse_gated
from onebase.serve.model.norms import Norm, fuse_norms
from onebase.serve.model.packed import join_linears
from onebase.serve.model.probe import ProbeResult, probe_forward
from onebase.serve.model.rotary import fuse_rotary
from onebase.serve.model.sites import ProbedSite
from onebase.serve.model.sums import LayerParts, fuse_sums
from onebase.serve.model.trial import uses_triton


def fuse(model: PreTrainedModel, context: AttentionContext, result: ProbeResult) -> None:
    """Put them in place, before adapters wrap the modules' forwards."""
    fuse_norms(norm.module for norm in result.norms)
    _fuse_sums(model, context, result)
    if not uses_triton(model.get_input_embeddings().weight):
        return  # pack_linears does the rest on a CPU
    from onebase.serve.model.few import use_few_rows  # with Triton, which is not everywhere

    for layer, module in context.modules.items():
        shape, (heads, _) = context.shapes[layer], context.calls_by_layer[layer]
        fuse_rotary(module, heads, shape.num_kv_heads, shape.head_dim)
    fuse_gated(model.modules())
    join_linears(input_groups(result.sites))
    use_few_rows(dict.fromkeys(site.module for site in result.sites))


def _fuse_sums(model: PreTrainedModel, context: AttentionContext, result: ProbeResult) -> None:
    """Of the layers whose norms are fused."""
    norms = {norm.module: norm.module.forward for norm in result.norms if isinstance(norm.module.forward, Norm)}
    feeding = {path: norm.module for norm in result.norms for path in norm.feeds}
    parts = {}
    for layer in result.layers:
        first = feeding.get(layer.attention)
        if layer.path is not None and first is not None:
            module, attention = model.get_submodule(layer.path), model.get_submodule(layer.attention)
            found = _layer_parts(module, attention, first, norms)
            if found is not None:
                parts[module] = found
    if parts:
        context.sums = fuse_sums(parts, norms, lambda: probe_forward(model, context))


def _layer_parts(
    layer: nn.Module, attention: nn.Module, first: nn.Module, norms: Mapping[nn.Module, Norm]
) -> LayerParts | None:
    """A layer's modules, where it has two norms, attention, and one more with weights; None where not."""
    others = [child for child in layer.children() if child is not attention and child is not first]
    others = [child for child in others if next(child.parameters(), None) is not None]
    second = [child for child in others if child in norms]
    fed = [child for child in others if child not in norms]
    if len(second) != 1 or len(fed) != 1:
        return None
    return LayerParts(first, attention, second[0], fed[0])


def input_groups(probed: Sequence[ProbedSite]) -> list[list[nn.Module]]:
    """The sites' modules, those that read the same input together."""
    return [[probed[index].module for index in group] for group in dict.fromkeys(entry.group for entry in probed)]

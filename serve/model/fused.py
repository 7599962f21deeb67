"""Which modules of a base get a faster body than their own forward: those where a trial finds the same numbers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from onebase.serve.model.attention import AttentionContext
from onebase.serve.model.gated import fuse_gated
from onebase.serve.model.norms import fuse_norms
from onebase.serve.model.packed import join_linears
from onebase.serve.model.probe import ProbeResult
from onebase.serve.model.rotary import fuse_rotary
from onebase.serve.model.sites import ProbedSite
from onebase.serve.model.trial import uses_triton


def fuse(model: PreTrainedModel, context: AttentionContext, result: ProbeResult) -> None:
    """Put them in place, before adapters wrap the modules' forwards."""
    fuse_norms(norm.module for norm in result.norms)
    if not uses_triton(model.get_input_embeddings().weight):
        return  # pack_linears does the rest on a CPU
    from onebase.serve.model.few import use_few_rows  # with Triton, which is not everywhere

    for layer, module in context.modules.items():
        shape, (heads, _) = context.shapes[layer], context.calls_by_layer[layer]
        fuse_rotary(module, heads, shape.num_kv_heads, shape.head_dim)
    fuse_gated(model.modules())
    join_linears(input_groups(result.sites))
    use_few_rows(dict.fromkeys(site.module for site in result.sites))


def input_groups(probed: Sequence[ProbedSite]) -> list[list[nn.Module]]:
    """The sites' modules, those that read the same input together."""
    return [[probed[index].module for index in group] for group in dict.fromkeys(entry.group for entry in probed)]

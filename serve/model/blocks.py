"""Finds the decoder layers of a model and the blocks inside: the attention module and the feed-forward module of each.

Nothing is known of architectures by name. The attention module is the one that calls attention; the feed-forward module
is the one sibling of it with several linear modules inside; a block's residual stream is what the norm before it read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from onebase.adapters.base import Layer, Site, SiteKind
from onebase.serve.model.attention import AttentionContext
from onebase.serve.model.hooks import ForwardWatcher
from onebase.serve.model.quantised import is_quantised
from onebase.serve.model.sites import ProbedBlock, ProbedLayer


@dataclass(slots=True)
class Blocks:
    """What was found. residual: path of a block -> the norm whose input is its residual stream."""

    blocks: list[ProbedBlock] = field(default_factory=list)
    layers: list[Layer] = field(default_factory=list)
    residual: dict[str, nn.Module] = field(default_factory=dict)

    def fed_by(self, norm: nn.Module) -> tuple[str, ...]:
        """Paths of the blocks that read this norm's output."""
        return tuple(path for path, module in self.residual.items() if module is norm)


class BlockCalls(ForwardWatcher):
    """Records, while it is entered, what every module that may be a block or its norm reads and gives."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.modules())
        self._model = model
        self._sources: dict[nn.Module, Tensor] = {}
        self._outputs: dict[nn.Module, Tensor] = {}

    def find(self, context: AttentionContext) -> Blocks:
        """The blocks, after the forward. The recorded tensors are let go."""
        found = Blocks()
        paths = {module: path for path, module in self._model.named_modules()}
        for index in sorted(context.modules):
            attention = context.modules[index]
            parent = self._model.get_submodule(paths[attention].rpartition(".")[0])
            mlp = _feed_forward(parent, attention)
            width = self._sources[attention].shape[-1]
            self._add(found, paths[attention], attention, SiteKind.ATTENTION, parent, width)
            if mlp is not None:
                self._add(found, paths[mlp], mlp, SiteKind.MLP, parent, width)
            layer = self._add_layer(found, paths, attention, width)
            found.layers.append(_layer(context, index, paths[attention], None if mlp is None else paths[mlp], layer))
        self._sources.clear()
        self._outputs.clear()
        return found

    def _add_layer(self, found: Blocks, paths: Mapping[nn.Module, str], attention: nn.Module, width: int) -> str | None:
        """The path of the decoder layer around an attention module: the module that stands in a list of layers."""
        path = paths[attention]
        while path and not isinstance(self._model.get_submodule(path.rpartition(".")[0]), nn.ModuleList):
            path = path.rpartition(".")[0]
        module = self._model.get_submodule(path)
        out = self._outputs.get(module)
        taken = any(block.module is module for block in found.blocks)
        if not path or taken or out is None or out.shape[:1] != (1,) or out.shape[2:] != (width,):
            return None
        found.blocks.append(ProbedLayer(Site(path, SiteKind.LAYER, width, width), module))
        return path

    def _add(self, found: Blocks, path: str, module: nn.Module, kind: SiteKind, parent: nn.Module, width: int) -> None:
        found.blocks.append(ProbedBlock(Site(path, kind, width, width), module))
        source = self._sources.get(module)
        for sibling in parent.children():
            if source is not None and sibling in self._sources and self._outputs.get(sibling) is source:
                found.residual[path] = sibling

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = [item for item in (*args, kwargs.get("hidden_states")) if isinstance(item, Tensor)]
        if tensors:
            self._sources[module] = tensors[0]

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        first = output[0] if isinstance(output, tuple) and output else output
        if isinstance(first, Tensor):
            self._outputs[module] = first


def _feed_forward(parent: nn.Module, attention: nn.Module) -> nn.Module | None:
    others = [child for child in parent.children() if child is not attention and _num_linear(child) > 1]
    return others[0] if len(others) == 1 else None


def _num_linear(module: nn.Module) -> int:
    return sum(isinstance(child, nn.Linear | Conv1D) or is_quantised(child) for child in module.modules())


def _layer(context: AttentionContext, index: int, attention: str, mlp: str | None, path: str | None) -> Layer:
    shape = context.shapes[index]
    num_heads, options = context.calls_by_layer[index]
    return Layer(attention, mlp, num_heads, shape.num_kv_heads, shape.head_dim, options.scale, path)

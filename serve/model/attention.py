"""The attention seam: transformers' modelling code calls the function registered here.

The batch is found through the module, not through keyword arguments (some architectures drop those they do not
know). No mask function is registered on purpose: transformers then builds no mask, and makes no device sync.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from onebase.adapters.errors import ModelRejected
from onebase.kernels.attention import AttentionBatch, AttentionBody, AttentionOptions, PageCache
from onebase.kernels.ops.instruction import wide
from onebase.kernels.ops.prefix import GatedPrefix
from onebase.kernels.pages import LayerShape, SlotLayout
from onebase.serve.model.site_context import SiteContext
from onebase.serve.model.sums import Sums

ATTENTION_NAME = "onebase_paged"
_CONTEXT = "onebase_attention"

# Keyword arguments that change nothing in the forward of a decoder at inference.
_INERT = frozenset(
    {
        "dropout",
        "position_ids",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "cache_position",
        "cache_params",
    }
    | {
        "cu_seq_lens_q",
        "cu_seq_lens_k",
        "max_length_q",
        "max_length_k",
        "position_embeddings",
        "layer_idx",
        "return_dict",
    }
)


@dataclass(slots=True, eq=False)
class AttentionContext:
    """Pages of every layer and the batch of the present step. One per loaded model.

    Layers are discovered by the probe forward: the first call of a layer records its shape and makes its pages. These
    hold K and V as they are; the pages that serve hold them in fp8 where that was asked for.
    """

    body: AttentionBody
    page_size: int
    num_pages: int
    fp8: bool = False
    batch: AttentionBatch | None = None
    shapes: dict[int, LayerShape] = field(default_factory=dict)
    caches: dict[int, PageCache] = field(default_factory=dict)
    slots: Tensor | None = None  # [num_pages, bytes of a page of every layer], once the pages lie so
    calls: int = 0
    calls_by_layer: dict[int, tuple[int, AttentionOptions]] = field(default_factory=dict)  # query heads, options
    modules: dict[int, nn.Module] = field(default_factory=dict)  # which module called, by layer
    sums: Sums = field(default_factory=Sums)  # of the model's layers
    sites: SiteContext | None = None  # the adapters' side, once there is one
    paths: dict[int, str] = field(default_factory=dict)  # the attention modules' sites, by layer

    def attach(self, model: nn.Module) -> None:
        """Make the context reachable from every attention module."""
        for module in model.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                setattr(module, _CONTEXT, self)

    def forget(self) -> None:
        """What a forward that raised has left for its later modules."""
        self.batch = None
        self.sums.forget()
        if self.sites is not None:
            self.sites.forget()

    def slot_layout(self) -> SlotLayout:
        """How one page of every known layer lies in a slot."""
        return SlotLayout.of(list(self._stored().values()), self.page_size)

    def _stored(self) -> dict[int, LayerShape]:
        """The known layers' shapes in the pages that serve."""
        return {layer: replace(shape, fp8=self.fp8) for layer, shape in self.shapes.items()}

    def lie_in(self, buffer: Tensor, num_pages: int) -> None:
        """Give every known layer its part of ``num_pages`` slots, in place of the pages it has; those are lost.

        buffer: uint8, one-dimensional; its first slots become the pages."""
        layout = self.slot_layout()
        self.num_pages = num_pages
        self.slots = buffer[: num_pages * layout.nbytes].view(num_pages, layout.nbytes)
        self.caches = {
            layer: PageCache.within(buffer, shape, self.page_size, num_pages, offset, layout.nbytes)
            for (layer, shape), offset in zip(self._stored().items(), layout.offsets, strict=True)
        }

    def move_pages(self, moves: Mapping[int, int]) -> None:
        """Copy pages of every layer, from -> to, one slot at a time: ten times faster on a CPU than an indexed copy."""
        if self.slots is None:
            raise RuntimeError("the pages do not lie in slots")
        for source, target in moves.items():
            self.slots[target].copy_(self.slots[source])

    def adapt(self, sites: SiteContext, paths: Sequence[str]) -> None:
        """From now on the step's adapters may add to what attention gives. paths: the layers' attention modules."""
        self.sites = sites
        self.paths = dict(zip(sorted(self.shapes), paths, strict=True))

    @property
    def windows(self) -> set[int | None]:
        """The sliding windows that the layers passed."""
        return {options.window for _, options in self.calls_by_layer.values()}

    def warm_up(self) -> None:
        """Compile what the layers need, once for each kind of layer."""
        kinds: dict[tuple[object, ...], int] = {}
        for layer, (num_heads, options) in self.calls_by_layer.items():
            kinds[self.shapes[layer], num_heads, options.window, options.softcap, options.sinks is None] = layer
        for layer in kinds.values():
            num_heads, options = self.calls_by_layer[layer]
            self.body.warm_up(num_heads, self.caches[layer], options)

    def cache_of(self, layer: int, key: Tensor) -> PageCache:
        cache = self.caches.get(layer)
        if cache is None:
            self.shapes[layer] = LayerShape(key.shape[1], key.shape[3], key.dtype, key.device)
            cache = self.caches[layer] = self._pages(layer)
        return cache

    def _pages(self, layer: int) -> PageCache:
        return PageCache.of_shape(self.shapes[layer], self.page_size, self.num_pages)


def paged_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: query [1, H, T, D], key and value [1, KV, T, D] -> ([1, T, H, D], None)."""
    context: AttentionContext = getattr(module, _CONTEXT)
    if context.batch is None:
        raise RuntimeError("the forward was called outside a step: no attention batch is set")
    _refuse_unknown(module, attention_mask, is_causal, kwargs, key.shape == value.shape)
    context.calls += 1
    scale = 1.0 / math.sqrt(query.shape[-1]) if scaling is None else float(scaling)
    options = AttentionOptions(scale, sliding_window, softcap, s_aux)
    layer: int = module.layer_idx  # type: ignore[assignment]
    context.calls_by_layer[layer] = query.shape[1], options
    context.modules[layer] = module
    out = context.body(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        context.cache_of(layer, key),
        context.batch,
        options,
    )
    if context.sites is not None and context.sites.touches(context.paths[layer]):
        _add_gated(context.sites, context.paths[layer], query[0].transpose(0, 1), out, scale)
    return out.unsqueeze(0), None


def _add_gated(sites: SiteContext, path: str, query: Tensor, out: Tensor, scale: float) -> None:
    """Add the gated prefixes of the step's adapters to out [T, H, D], or leave them for the whole module's output."""
    gated = [(item.segment, item.op) for item in sites.placed(path) if isinstance(item.op, GatedPrefix)]
    if not gated:
        return
    rows = [slice(segment.start, segment.stop) for segment, _ in gated]
    lengths = [segment.length for segment, _ in gated]
    deltas = GatedPrefix.batched([op for _, op in gated], lengths, torch.cat([query[at] for at in rows]), scale)
    for (segment, op), at, delta in zip(gated, rows, torch.split(deltas, lengths), strict=True):
        scaled = delta if segment.scale == 1 else delta * segment.scale
        if op.projected:
            out[at] = (wide(out[at]) + scaled).to(out.dtype)
        else:
            sites.beside.setdefault(path, []).append((at, scaled.flatten(1)))


def _refuse_unknown(
    module: nn.Module, mask: Tensor | None, is_causal: bool | None, kwargs: dict[str, Any], same_shape: bool
) -> None:
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if not causal:
        raise ModelRejected(f"{type(module).__name__} attends in both directions; only causal decoders are served")
    if mask is not None:
        raise ModelRejected(f"{type(module).__name__} passes a mask of its own (alibi, say), which is not honoured")
    if not same_shape:
        raise ModelRejected(f"{type(module).__name__} has keys and values of different shapes (latent attention)")
    for name, value in kwargs.items():
        if value is not None and value is not False and name not in _INERT:
            raise ModelRejected(f"{type(module).__name__} passes the attention option {name!r}, which is not honoured")


AttentionInterface.register(ATTENTION_NAME, paged_attention_forward)

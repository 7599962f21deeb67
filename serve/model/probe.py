"""The probe forward: learns from one small forward which modules can be adapted, and proves that pages are exact.

Nothing is known of architectures by name. A module is a site if it sees every token of the packed batch exactly once
(or every sampled row, for the output head). The same forward through transformers' own eager attention must give the
same logits, in one go and in chunks; a model for which it does not is refused.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from onebase.adapters.base import Layer, Site, SiteKind
from onebase.adapters.errors import ModelRejected
from onebase.kernels.attention import AttentionBatch
from onebase.serve.model.attention import ATTENTION_NAME, AttentionContext
from onebase.serve.model.blocks import BlockCalls, Blocks
from onebase.serve.model.expert_calls import ExpertCalls
from onebase.serve.model.quantised import is_quantised
from onebase.serve.model.routers import RouterCalls
from onebase.serve.model.sites import ProbedBlock, ProbedNorm, ProbedSite

PROBE_TOKENS = 24
_HEAD_ROWS = 3
# Largest difference of logits, as a share of their standard deviation, that rounding alone explains.
_COPIES = 3  # of the tokens in one batch, for sums in another order
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.05, torch.float64: 1e-6}


@dataclass(slots=True)
class _Call:
    path: str
    module: nn.Module
    source: Tensor | None  # its one argument; None where it is called in another way
    rows: int


@dataclass(slots=True)
class ProbeResult:
    """sites: linear modules and embeddings in call order; refused: module path -> why it cannot be adapted; expected:
    logits of the probe's last tokens by transformers' own forward, [rows, vocabulary] float32; rounding: what that
    differs by from itself, see prove."""

    sites: list[ProbedSite] = field(default_factory=list)
    norms: list[ProbedNorm] = field(default_factory=list)
    blocks: list[ProbedBlock] = field(default_factory=list)
    layers: list[Layer] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    expected: Tensor = field(default_factory=lambda: torch.empty(0))
    rounding: float = 0.0


def site_of(path: str, module: nn.Module) -> Site | None:
    """The site a module would be, or None for kinds of modules that are not adapted."""
    if type(module) is nn.Linear or is_quantised(module):
        assert isinstance(module.in_features, int)
        assert isinstance(module.out_features, int)
        return Site(path, SiteKind.LINEAR, module.in_features, module.out_features)
    if isinstance(module, Conv1D):
        return Site(path, SiteKind.LINEAR, module.nx, module.nf)
    if isinstance(module, nn.Embedding):
        scale = getattr(module, "embed_scale", None)
        factor = 1.0 if scale is None else float(scale)
        return Site(path, SiteKind.EMBEDDING, module.num_embeddings, module.embedding_dim, factor)
    if _is_norm(module):
        assert isinstance(module.weight, Tensor)
        width = module.weight.numel()
        return Site(path, SiteKind.NORM, width, width)
    return None


def _is_norm(module: nn.Module) -> bool:
    """By what it has: one vector of weights, at most a bias, and no modules inside; and by its name."""
    parameters = dict(module.named_parameters(recurse=False))
    known = "weight" in parameters and parameters.keys() <= {"weight", "bias"} and not list(module.children())
    return known and type(module).__name__.endswith("Norm") and parameters["weight"].dim() == 1


@torch.inference_mode()
def probe(model: PreTrainedModel, context: AttentionContext) -> ProbeResult:
    """Run the probe. ``context`` must be attached and hold pages for PROBE_TOKENS; it learns every layer's shape."""
    tokens = _tokens(model)
    with BlockCalls(model) as block_calls, ExpertCalls(model) as expert_calls, RouterCalls(model) as router_calls:
        calls = _record_calls(model, lambda: probe_forward(model, context))
    if context.calls != len(context.shapes) or not context.shapes:
        raise ModelRejected(
            f"{type(model).__name__} does not route its attention through transformers' attention interface"
        )
    with _plain_attention(model):
        expected = model(input_ids=tokens[None], use_cache=False).logits[0, -_HEAD_ROWS:].float()
    result = _classify(model, calls, block_calls.find(context))
    result.expected, result.rounding = expected, _rounding(model, tokens, expected)
    for found, refused in (
        expert_calls.find(PROBE_TOKENS, _TOLERANCE[model.dtype]),
        router_calls.find(PROBE_TOKENS),
    ):
        result.blocks.extend(found)
        result.refused.update(refused)
    return result


def _tokens(model: PreTrainedModel) -> Tensor:
    vocab_size: int = model.get_input_embeddings().weight.shape[0]
    return torch.arange(PROBE_TOKENS, device=model.device) * 7 % vocab_size


def _record_calls(model: PreTrainedModel, forward: Callable[[], object]) -> list[_Call]:
    calls: list[_Call] = []

    def hook(path: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            source = args[0] if len(args) == 1 and not kwargs and isinstance(args[0], Tensor) else None
            calls.append(_Call(path, module, source, _rows(module, source)))

        return record

    handles = [
        module.register_forward_pre_hook(hook(path), with_kwargs=True)
        for path, module in model.named_modules()
        if site_of(path, module) is not None
    ]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _rows(module: nn.Module, source: Tensor | None) -> int:
    if source is None:
        return 0
    if _is_norm(module):
        return source.shape[0] if source.dim() == 2 else source.shape[1] * (source.shape[0] == 1)
    return source.numel() if isinstance(module, nn.Embedding) else source.numel() // source.shape[-1]


def _paged(
    model: PreTrainedModel, context: AttentionContext, tokens: Tensor, chunks: tuple[int, ...], keep: int
) -> Tensor:
    """Logits of the last ``keep`` tokens of the last chunk, through pages: [keep, vocabulary]."""
    pages = [list(range(-(-len(tokens) // context.page_size)))]
    start, logits = 0, tokens
    for length in chunks:
        stop = start + length
        context.calls = 0
        context.batch = AttentionBatch.build((length,), (stop,), pages, context.page_size, tokens.device)
        logits = model(
            input_ids=tokens[None, start:stop],
            position_ids=torch.arange(start, stop, device=tokens.device)[None],
            use_cache=False,
            logits_to_keep=torch.arange(length - keep, length, device=tokens.device),
        ).logits[0]
        context.batch = None
        start = stop
    return logits


@contextmanager
def _plain_attention(model: PreTrainedModel) -> Iterator[None]:
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(ATTENTION_NAME)


def probe_forward(model: PreTrainedModel, context: AttentionContext) -> Tensor:
    """The probe's forward through pages once more, for those who watch it: logits [rows, vocabulary]."""
    return _paged(model, context, _tokens(model), (PROBE_TOKENS,), _HEAD_ROWS)


@torch.inference_mode()
def prove(model: PreTrainedModel, context: AttentionContext, result: ProbeResult) -> None:
    """Raises ModelRejected where the forward through pages does not give what the probe expects of it."""
    tokens, expected = _tokens(model), result.expected
    allowed = max(_TOLERANCE[model.dtype] * float(expected.std()), result.rounding)
    half = PROBE_TOKENS // 2
    for chunks in ((PROBE_TOKENS,), (half, PROBE_TOKENS - half - _HEAD_ROWS, _HEAD_ROWS)):
        got = _paged(model, context, tokens, chunks, _HEAD_ROWS).float()
        worst = float((got - expected).abs().max())
        if not worst <= allowed:
            raise ModelRejected(
                f"{type(model).__name__} through paged attention (chunks {chunks}) differs from transformers' own "
                f"forward by {worst:.3g} in the logits, allowed {allowed:.3g}: something in it depends on more than "
                "packed tokens and their positions"
            )


def _rounding(model: PreTrainedModel, tokens: Tensor, expected: Tensor) -> float:
    """Twice what transformers' own forward differs by from itself where products have another shape, and so other sums:
    in half precision that grows with depth and width. At most what still tells one model from another. To be measured
    before modules get other bodies: a wrong one must not widen what is allowed."""
    with _plain_attention(model):
        other = model(input_ids=tokens.expand(_COPIES, -1), use_cache=False).logits[0, -_HEAD_ROWS:].float()
    return min(2.0 * float((other - expected).abs().max()), 0.5 * float(expected.std()))


def _classify(model: PreTrainedModel, calls: list[_Call], blocks: Blocks) -> ProbeResult:
    result = ProbeResult(blocks=blocks.blocks, layers=blocks.layers)
    times: dict[str, int] = {}
    for call in calls:
        times[call.path] = times.get(call.path, 0) + 1
    head, inputs = model.get_output_embeddings(), model.get_input_embeddings()
    kept = [call for call in calls if _is_site(call, times[call.path], call.module is head, result)]
    for members in _group_by_source(call for call in kept if not _is_norm(call.module)):
        group = tuple(len(result.sites) + i for i in range(len(members)))
        for call in members:
            site = site_of(call.path, call.module)
            assert site is not None  # only sites were recorded
            result.sites.append(ProbedSite(site, call.module, group, call.module is head, call.module is inputs))
    for call in kept:
        site = site_of(call.path, call.module)
        if site is not None and site.kind is SiteKind.NORM:
            result.norms.append(ProbedNorm(site, call.module, blocks.fed_by(call.module)))
    seen = set(times)
    for path, module in model.named_modules():
        if site_of(path, module) is not None and path not in seen:
            result.refused[path] = "it is not called in the forward"
    return result


def _is_site(call: _Call, times: int, is_head: bool, result: ProbeResult) -> bool:
    rows = _HEAD_ROWS if is_head else PROBE_TOKENS
    if call.source is None:
        result.refused[call.path] = "its forward takes more than the one tensor of a linear or embedding module"
    elif times != 1:
        result.refused[call.path] = f"it is called {times} times in one forward"
    elif call.rows != rows:
        result.refused[call.path] = "it does not see every token of the batch (an expert, say)"
    return call.path not in result.refused


def _group_by_source(calls: Iterable[_Call]) -> Iterator[list[_Call]]:
    """Neighbouring calls on the same tensor object form a group; the head and embeddings stand alone."""
    for _, members in itertools.groupby(calls, key=lambda call: (id(call.source), type(call.module))):
        yield list(members)

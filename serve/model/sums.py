"""Residual sums in one pass, or one launch, with the norm that reads them.

A pre-norm decoder layer adds what its attention and its feed-forward give to the residual stream, and a norm is the
first to read either sum: the layer's second one, the next layer's first one, or the last one of the model. Whether a
layer is of that kind is tried on the layer itself, in a forward; any other keeps its own forward. Norms are called as
before, adapters wrap their forwards: a norm that was computed with its sum gives what is there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from onebase.serve.model.hooks import ForwardWatcher
from onebase.serve.model.norms import Norm
from onebase.serve.model.trial import replace_forward, same_numbers

_LARGE = 64.0  # times the residual stream of the trial
_log = logging.getLogger("onebase.engine")


@dataclass(slots=True, eq=False)
class Sums:
    """The latest sum of a model, and its norm, until that is asked for."""

    _norm: Norm | None = None
    _total: Tensor | None = None
    _normed: Tensor | None = None

    def add(self, norm: Norm, x: Tensor, residual: Tensor) -> Tensor:
        """The sum, which ``norm`` will read. Raises ValueError where the two are not alike."""
        if x.shape != residual.shape or x.dtype != residual.dtype:
            raise ValueError(f"a sum of {x.dtype} {list(x.shape)} and {residual.dtype} {list(residual.shape)}")
        self._norm = norm
        self._total, self._normed = norm.of_sum(x, residual)
        return self._total

    def take(self, norm: Norm, x: Tensor) -> Tensor | None:
        """What ``norm`` gives of x, once, where x is the latest sum."""
        if x is not self._total or norm is not self._norm:
            return None
        normed = self._normed
        self.forget()
        return normed

    def forget(self) -> None:
        """The sum was changed in place, or is not read."""
        self._norm = self._total = self._normed = None


@dataclass(frozen=True, slots=True, eq=False)
class SumNorm:
    """Forward of a norm that may have been computed with its sum."""

    norm: Norm
    sums: Sums

    def __call__(self, x: Tensor) -> Tensor:
        """x: [..., width]."""
        ready = self.sums.take(self.norm, x)
        return self.norm(x) if ready is None else ready


@dataclass(frozen=True, slots=True)
class LayerParts:
    """The modules of a decoder layer's blocks, and the norms that feed them."""

    first: nn.Module
    attention: nn.Module
    second: nn.Module
    feed_forward: nn.Module


@dataclass(frozen=True, slots=True, eq=False)
class PreNormLayer:
    """Forward of one decoder layer. plain: its own. second_norm: what is behind the second norm's module; next_norm:
    behind the norm that reads the output, None where that is not known."""

    plain: Callable[..., Any]
    parts: LayerParts
    sums: Sums
    second_norm: Norm
    next_norm: Norm | None = None

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """hidden_states: [1, T, width]. The rest goes to attention, as transformers' layers have it."""
        if args:
            return self.plain(hidden_states, *args, **kwargs)
        parts = self.parts
        attended: Tensor = parts.attention(hidden_states=parts.first(hidden_states), **kwargs)[0]
        middle = self.sums.add(self.second_norm, attended, hidden_states)
        given = parts.feed_forward(parts.second(middle))
        fed: Tensor = given[0] if isinstance(given, tuple) else given  # with a router's scores
        fed = fed.view(middle.shape)  # some experts drop the batch's dimension
        return fed + middle if self.next_norm is None else self.sums.add(self.next_norm, fed, middle)


@torch.inference_mode()
def fuse_sums(
    parts: Mapping[nn.Module, LayerParts], norms: Mapping[nn.Module, Norm], forward: Callable[[], Tensor]
) -> Sums:
    """Put fused forwards in place of the layers' for which they give the same numbers, and of the norms that read their
    sums: of none where the model as a whole does not give what it gave. parts: by layer; norms: the norms that have a
    fused forward; forward: one of the model's, its logits."""
    sums = Sums()
    with _Trial(parts, norms, sums) as trial:
        expected = forward()
    sums.forget()
    made = trial.made()
    before = {layer: fused.plain for layer, fused in made.items()}
    for layer, fused in made.items():
        replace_forward(layer, fused)
        readers = [fused.parts.second, *(module for module in norms if norms[module] is fused.next_norm)]
        for module in readers:
            before[module] = norms[module]
            replace_forward(module, SumNorm(norms[module], sums))
    if not same_numbers(forward(), expected):
        for module, plain in before.items():
            replace_forward(module, plain)
    sums.forget()
    return sums


class _Trial(ForwardWatcher):
    """Tries each layer behind its own call, in the same step and with what that was called with."""

    def __init__(self, parts: Mapping[nn.Module, LayerParts], norms: Mapping[nn.Module, Norm], sums: Sums) -> None:
        super().__init__([*parts, *norms])
        self._parts = parts
        self._norms = norms
        self._sums = sums
        self._calls: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self._outputs: dict[nn.Module, tuple[Tensor, Tensor]] = {}  # with a copy of what is in it
        self._fused: dict[nn.Module, PreNormLayer] = {}
        self._readers: dict[nn.Module, list[nn.Module]] = {}  # by layer, the norms that read its output as it was

    def made(self) -> dict[nn.Module, PreNormLayer]:
        """By layer, each with the norm that read its output, where it is the only one."""
        found = {}
        for layer, fused in self._fused.items():
            readers = [self._norms[norm] for norm in self._readers.get(layer, ())]
            found[layer] = replace(fused, next_norm=readers[0]) if len(readers) == 1 else fused
        return found

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module in self._parts:
            self._calls[module] = args, kwargs
            return
        for layer, (output, copy) in self._outputs.items():
            readers = self._readers.setdefault(layer, [])
            if args and args[0] is output and module not in readers and torch.equal(output, copy):
                readers.append(module)

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        parts = self._parts.get(module)
        if parts is None or not isinstance(output, Tensor):
            return
        fused = PreNormLayer(module.forward, parts, self._sums, self._norms[parts.second])
        given, named = self._calls[module]
        try:
            same = len(given) == 1 and self._agree(fused, given[0], named, output)
        except Exception as error:  # a stranger's module, called in a way of ours
            _log.debug("%s keeps its forward: %s: %s", type(module).__name__, type(error).__name__, error)
            return
        if same:
            self._fused[module], self._outputs[module] = fused, (output, output.clone())

    @staticmethod
    def _agree(fused: PreNormLayer, x: Tensor, named: dict[str, Any], output: Tensor) -> bool:
        """Also on a large input, which a layer that bounds its output would cut. What that leaves in the pages is
        written over by whoever uses them next."""
        large = x * _LARGE
        expected = fused.plain(large, **named)
        if bool(torch.isfinite(expected).all()) and not same_numbers(fused(large, **named), expected):
            return False
        return same_numbers(fused(x, **named), output)

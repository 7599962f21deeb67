"""Finds the modules of routed experts of a model, and says of each why it cannot be adapted if it cannot."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from onebase.adapters.base import Site, SiteKind
from onebase.serve.model.experts import ProbedExperts, difference, experts_of
from onebase.serve.model.hooks import CallRecorder


class ExpertCalls(CallRecorder):
    """Records, while it is entered, what every module with stacked expert weights is called with."""

    def __init__(self, model: nn.Module) -> None:
        self._paths = {
            module: path for path, module in model.named_modules() if experts_of(module, per_token=1) is not None
        }
        self._others = [
            path for path, module in model.named_modules() if _is_stacked(module) and module not in self._paths
        ]
        super().__init__(self._paths)

    def find(self, num_rows: int, allowed: float) -> tuple[list[ProbedExperts], dict[str, str]]:
        """What can be adapted, and path -> reason for the rest. The recorded tensors are let go.

        num_rows: tokens of the forward. allowed: the largest difference between the forward with terms and the
        module's own that rounding explains, as a share of the values' deviation.
        """
        found: list[ProbedExperts] = []
        refused = dict.fromkeys(
            self._others, "its stacked weights are not those of routed experts as transformers has them"
        )
        for module, path in self._paths.items():
            reason = _refusal(self._calls[module], num_rows)
            entry = None if reason else _entry(path, module, self._calls[module][0])
            if (
                entry is not None
                and not (worst := difference(module, entry.experts, self._calls[module][0])) <= allowed
            ):
                reason = f"its experts compute something of their own: {worst:.3g} off on random rows"
            if reason or entry is None:
                refused[path] = reason
            else:
                found.append(entry)
        self._calls.clear()
        return found, refused


def _is_stacked(module: nn.Module) -> bool:
    return any(parameter.dim() == 3 for parameter in module.parameters(recurse=False))


def _refusal(calls: list[tuple[Any, ...]], num_rows: int) -> str:
    """Empty where the module is called once, with (hidden states, experts, weights) of every token."""
    if len(calls) != 1:
        return f"its experts are called {len(calls)} times in one forward"
    tensors = [item for item in calls[0] if isinstance(item, Tensor) and item.dim() == 2 and len(item) == num_rows]
    chosen = len(tensors) == len(calls[0]) == 3 and tensors[1].shape == tensors[2].shape
    if not chosen or tensors[1].is_floating_point() or not tensors[2].is_floating_point():
        return "its experts are not called with the hidden states, the chosen experts and their weights of every token"
    return ""


def _entry(path: str, module: nn.Module, call: tuple[Tensor, ...]) -> ProbedExperts | None:
    experts = experts_of(module, per_token=call[1].shape[1])
    if experts is None:
        return None
    width = call[0].shape[1]
    return ProbedExperts(Site(path, SiteKind.EXPERTS, width, width), module, experts)

"""Watching a forward: hooks on some modules that stay for as long as the watcher is entered."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Any, Self

from torch import nn


class ForwardWatcher:
    """Sees the arguments and the output of every call of the modules. Subclasses say what they keep."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._modules = tuple(modules)
        self._hooks: list[Any] = []

    def __enter__(self) -> Self:
        for module in self._modules:
            self._hooks.append(module.register_forward_pre_hook(self._before, with_kwargs=True))
            self._hooks.append(module.register_forward_hook(self._after))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A module is called."""

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """A module has answered."""


class CallRecorder(ForwardWatcher):
    """Keeps the arguments of every call, those by name after the others."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        super().__init__(modules)
        self._calls: dict[nn.Module, list[tuple[Any, ...]]] = {module: [] for module in self._modules}

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._calls[module].append((*args, *kwargs.values()))

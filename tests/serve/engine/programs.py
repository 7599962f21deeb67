"""Adapters made by hand: folders, and programs in the place of what would be compiled from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from onebase.adapters.base import Site
from onebase.adapters.program import AdapterProgram, SiteOps
from onebase.serve.engine.messages import AdapterUse, Failure

PROMPT = [5, 99, 23, 7, 64, 31]


def lora_tensors(sites: Iterable[Site], rank: int, draw: torch.Generator) -> dict[str, Tensor]:
    """Random factors at these linear modules, by their names in a file."""
    tensors = {}
    for site in sites:
        key = f"base_model.model.{site.path}.lora"
        tensors[f"{key}_A.weight"] = torch.randn(rank, site.in_features, generator=draw) * 0.2
        tensors[f"{key}_B.weight"] = torch.randn(site.out_features, rank, generator=draw) * 0.2
    return tensors


def save_lora(folder: Path, sites: Iterable[Site], rank: int, seed: int) -> Path:
    """A folder of such an adapter."""
    tensors = lora_tensors(sites, rank, torch.Generator().manual_seed(seed))
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(f'{{"peft_type": "LORA", "r": {rank}, "lora_alpha": {rank}}}')
    return folder


class Programs:
    """Programs by name, for one engine."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver
        self.made: dict[str, AdapterProgram] = {}
        self.compiled: list[str] = []
        driver.engine.adapters.transit.fetcher.compile = self._compile

    def add(self, name: str, ops: Mapping[str, SiteOps], **rest: Any) -> None:
        self.made[name] = AdapterProgram(name, "MADE", ops, **rest)

    def use(self, name: str, scale: float = 1.0) -> AdapterUse:
        return AdapterUse(name, name, scale, f"{name}-as-asked")

    def refusal(self, *uses: AdapterUse) -> Failure:
        request_id = self.driver.submit(PROMPT, *uses, max_tokens=2)
        self.driver.run()
        failure = self.driver.failures[request_id]
        assert isinstance(failure, Failure)
        assert (failure.kind, failure.param) == ("RequestRejected", "adapters")
        return failure

    def _compile(self, path: Path, digest: str) -> AdapterProgram:
        self.compiled.append(digest)
        return self.made[digest]

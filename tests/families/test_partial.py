"""PARTIAL: served parameters equal the same parameters put into transformers' own model."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .case import ALL_FIVE
from .recomputed import Draw, check_served, drawn, load

Write = Callable[[nn.Module, Draw], dict[str, Tensor]]


def _trained(model: nn.Module, draw: Draw) -> dict[str, Tensor]:
    """Every parameter with a change, as a training loop leaves it."""
    return {name: p.detach() + draw(*p.shape) * 0.3 for name, p in model.named_parameters()}


def bitfit(model: nn.Module, draw: Draw) -> dict[str, Tensor]:
    """All biases, and all norms: three of the five have no other."""
    return {name: tensor for name, tensor in _trained(model, draw).items() if tensor.dim() == 1}


def whole(model: nn.Module, draw: Draw) -> dict[str, Tensor]:
    """Every weight of the first layer, and three rows of the embedding: the head has them too where it is tied."""
    trained = _trained(model, draw)
    embedding = next(name for name, p in model.named_parameters() if p is model.get_input_embeddings().weight)
    tensors = {name: tensor for name, tensor in trained.items() if ".0." in name and tensor.dim() == 2}
    rows = model.get_input_embeddings().weight.detach().clone()
    rows[[3, 20, 127]] += draw(3, rows.shape[1])
    return tensors | {embedding: rows}


def entries(model: nn.Module, draw: Draw) -> dict[str, Tensor]:
    """Single entries of every parameter, Conv1D's transposed ones, norms and tied embeddings among them.

    OPT's positions are the exception: its embedding of them takes more than token ids, so that it is no site.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if "embed_positions" in name:
            continue
        count = max(1, parameter.numel() // 20)
        places = torch.randperm(parameter.numel(), generator=torch.Generator().manual_seed(len(name)))[:count]
        tensors |= {f"{name}.indices": places, f"{name}.values": draw(count)}
    return tensors


@contextmanager
def applied(tensors: dict[str, Tensor], adds: bool, model: nn.Module) -> Iterator[dict[str, Any]]:
    for name, parameter in model.named_parameters():
        if name in tensors:
            parameter.data = parameter + tensors[name] if adds else tensors[name].clone()
        elif f"{name}.values" in tensors:
            flat, places = parameter.data.view(-1), tensors[f"{name}.indices"].long()
            values = tensors[f"{name}.values"]
            flat[places] = flat[places] + values if adds else values
    yield {}


CASES: dict[str, tuple[Write, bool]] = {
    "bitfit": (bitfit, False),
    "bitfit-added": (lambda model, draw: {k: v * 0.2 for k, v in bitfit(model, draw).items()}, True),
    "whole": (whole, False),
    "entries": (entries, False),
    "entries-added": (entries, True),
}


@pytest.mark.parametrize("architecture", ALL_FIVE)
@pytest.mark.parametrize("case", CASES)
def test_parameters_are_as_if_the_base_had_them(
    case: str,
    architecture: str,
    checkpoint: Callable[..., Path],
    driver_of: Callable[[str], Any],
    families_cache: Path,
    tmp_path: Path,
) -> None:
    base, folder = checkpoint(architecture), tmp_path / case
    write, adds = CASES[case]
    tensors = write(load(base), drawn(7))
    folder.mkdir()
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "adapter.safetensors")
    config = {"peft_type": "PARTIAL", "mode": "add" if adds else "replace"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with_it = functools.partial(applied, tensors, adds)
    check_served(driver_of(architecture), base, architecture, folder, with_it, families_cache / "recomputed")

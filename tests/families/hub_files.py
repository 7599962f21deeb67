"""Folders as AdapterHub's adapters library writes them, with random weights, for a base of transformers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .hub_oracle import BLOCKS
from .recomputed import Draw, drawn

NAME = "task"
WIDTH = 64

# What the library writes for each kind of configuration, besides what a case sets.
BOTTLENECK: dict[str, Any] = {
    "adapter_residual_before_ln": False,
    "cross_adapter": False,
    "dropout": 0.1,
    "factorized_phm_W": True,
    "factorized_phm_rule": False,
    "hypercomplex_nonlinearity": "glorot-uniform",
    "init_weights": "bert",
    "init_weights_seed": None,
    "inv_adapter": None,
    "inv_adapter_reduction_factor": None,
    "is_parallel": False,
    "learn_phm": True,
    "leave_out": [],
    "ln_after": False,
    "ln_before": False,
    "mh_adapter": False,
    "non_linearity": "relu",
    "original_ln_after": True,
    "original_ln_before": True,
    "output_adapter": True,
    "phm_bias": True,
    "phm_c_init": "normal",
    "phm_dim": 4,
    "phm_init_range": 0.0001,
    "phm_layer": False,
    "phm_rank": 1,
    "reduction_factor": 16,
    "residual_before_ln": True,
    "scaling": 1.0,
    "shared_W_phm": False,
    "shared_phm_rule": True,
    "stochastic_depth": 0.0,
    "use_gating": False,
}
LORA: dict[str, Any] = {
    "alpha": 8,
    "architecture": "lora",
    "attn_matrices": ["q", "v"],
    "composition_mode": "add",
    "dropout": 0.0,
    "dtype": None,
    "init_weights": "lora",
    "init_weights_seed": None,
    "intermediate_lora": False,
    "leave_out": [],
    "output_lora": False,
    "r": 4,
    "selfattn_lora": True,
    "use_gating": False,
    "vera_b": None,
    "vera_d": None,
}
PREFIX: dict[str, Any] = {
    "architecture": "prefix_tuning",
    "bottleneck_size": 16,
    "cross_prefix": True,
    "dropout": 0.0,
    "encoder_prefix": True,
    "flat": False,
    "init_weights_seed": None,
    "leave_out": [],
    "non_linearity": "tanh",
    "prefix_length": 5,
    "shared_gating": True,
    "use_gating": False,
}
REFT: dict[str, Any] = {
    "architecture": "reft",
    "dropout": 0.05,
    "dtype": None,
    "init_weights_seed": None,
    "layers": "all",
    "non_linearity": None,
    "orthogonality": True,
    "output_reft": True,
    "prefix_positions": 3,
    "r": 4,
    "suffix_positions": 0,
    "tied_weights": False,
}
LORA_MODULES = {
    "llama": {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj"}
    | {"intermediate": "mlp.down_proj", "output": "mlp.up_proj"},
    "gpt2": {"c": "attn.c_attn", "intermediate": "mlp.c_fc", "output": "mlp.c_proj"},
}


@dataclass(frozen=True)
class HubCase:
    """parts: configurations, more than one for a union. version: as the library writes its own; None: as it did not."""

    name: str
    parts: tuple[Mapping[str, Any], ...]
    architectures: tuple[str, ...] = ("llama", "gpt2")
    version: str | None = "adapters.1.2.0"
    edit: Callable[[dict[str, Tensor]], None] | None = None

    def write(self, model: nn.Module, folder: Path) -> None:
        """The adapter for a base, with the base's head beside it."""
        draw = drawn(len(self.name))
        tensors: dict[str, Tensor] = {}
        for part in self.parts:
            tensors |= tensors_of(part, model, draw)
        if self.edit is not None:
            self.edit(tensors)
        folder.mkdir()
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "adapter.safetensors")
        save_file({"lm_head.weight": model.lm_head.weight.clone()}, folder / "model_head.safetensors")
        (folder / "head_config.json").write_text('{"config": null}')
        (folder / "adapter_config.json").write_text(json.dumps(self.config(model)))

    def config(self, model: nn.Module) -> dict[str, Any]:
        union = {"architecture": "union", "configs": list(self.parts)}
        config = {
            "config": dict(self.parts[0]) if len(self.parts) == 1 else union,
            "hidden_size": WIDTH,
            "model_class": type(model).__name__,
            "model_name": "somewhere/a-base",
            "model_type": model.config.model_type,
            "name": NAME,
            "version": self.version,
        }
        return {key: value for key, value in config.items() if value is not None}


def tensors_of(part: Mapping[str, Any], model: nn.Module, draw: Draw) -> dict[str, Tensor]:
    if part.get("architecture") == "lora":
        return _lora(part, model, draw)
    if part.get("architecture") == "prefix_tuning":
        return _prefix(part, model, draw)
    if part.get("architecture") == "reft":
        return _reft(part, model, draw)
    return _bottlenecks(part, model, draw)


def _bottlenecks(part: Mapping[str, Any], model: nn.Module, draw: Draw) -> dict[str, Tensor]:
    layers = BLOCKS[model.config.model_type][0]
    tensors: dict[str, Tensor] = {}
    for index in range(model.config.num_hidden_layers):
        factor = part["reduction_factor"]
        factor = factor.get(str(index), factor.get("default")) if isinstance(factor, dict) else factor
        rank = max(1, int(WIDTH // factor))
        for used, place in (("mh_adapter", "attention_adapters"), ("output_adapter", "output_adapters")):
            if part[used] and index not in part["leave_out"]:
                prefix = f"{layers}.{index}.{place}.adapters.{NAME}"
                tensors |= _projection(part, f"{prefix}.adapter_down.0", (WIDTH, rank), draw)
                tensors |= _projection(part, f"{prefix}.adapter_up", (rank, WIDTH), draw)
                if part["scaling"] in ("learned", "channel"):
                    tensors[f"{prefix}.scaling"] = draw(1 if part["scaling"] == "learned" else WIDTH) + 1
    root = f"{layers.partition('.')[0]}.shared_parameters.{NAME}"
    if part["phm_layer"] and part["shared_phm_rule"]:
        tensors |= _rule(part, f"{root}.phm_rule", draw)
    if part["phm_layer"] and part["shared_W_phm"]:
        tensors |= _weight(part, f"{root}.W_down", (WIDTH, rank), draw)
        tensors |= _weight(part, f"{root}.W_up", (rank, WIDTH), draw)
    return tensors


def _projection(part: Mapping[str, Any], prefix: str, sizes: tuple[int, int], draw: Draw) -> dict[str, Tensor]:
    if not part["phm_layer"]:
        return {f"{prefix}.weight": draw(*reversed(sizes)), f"{prefix}.bias": draw(sizes[1])}
    tensors = {f"{prefix}.b": draw(sizes[1])} if part["phm_bias"] else {}
    if not part["shared_phm_rule"]:
        tensors |= _rule(part, f"{prefix}.phm_rule", draw)
    return tensors if part["shared_W_phm"] else tensors | _weight(part, f"{prefix}.W", sizes, draw)


def _rule(part: Mapping[str, Any], at: str, draw: Draw) -> dict[str, Tensor]:
    n = part["phm_dim"]
    if part["factorized_phm_rule"]:
        return {f"{at}_left": draw(n, n, 1) * 3, f"{at}_right": draw(n, 1, n) * 3}
    return {at: draw(n, n, n) * 2}


def _weight(part: Mapping[str, Any], at: str, sizes: tuple[int, int], draw: Draw) -> dict[str, Tensor]:
    n, rank = part["phm_dim"], part["phm_rank"]
    rows, columns = (size // n for size in sizes)
    if part["factorized_phm_W"]:
        return {f"{at}_left": draw(n, rows, rank) * 3, f"{at}_right": draw(n, rank, columns)}
    return {at: draw(n, rows, columns)}


def _lora(part: Mapping[str, Any], model: nn.Module, draw: Draw) -> dict[str, Tensor]:
    modules = LORA_MODULES["gpt2" if model.config.model_type == "gpt2" else "llama"]
    chosen = ["c", *part["attn_matrices"]] if part["selfattn_lora"] else []
    chosen += [name for name in ("intermediate", "output") if part[f"{name}_lora"]]
    tensors: dict[str, Tensor] = {}
    layers = BLOCKS[model.config.model_type][0]
    for path, module in model.named_modules():
        wanted = path.startswith(layers) and any(path.endswith(modules.get(name, "?")) for name in chosen)
        if wanted and isinstance(module, nn.Linear | Conv1D):
            tensors |= _lora_module(part, path, module, draw)
    if part["vera_d"] is not None:
        root = f"{layers.partition('.')[0]}.shared_parameters.{NAME}"
        tensors |= {f"{root}.lora_A": draw(part["r"], WIDTH), f"{root}.lora_B": draw(WIDTH, part["r"])}
    return tensors


def _lora_module(part: Mapping[str, Any], path: str, module: nn.Module, draw: Draw) -> dict[str, Tensor]:
    width, out = module.weight.shape if isinstance(module, Conv1D) else reversed(module.weight.shape)
    prefix, r = f"{path}.loras.{NAME}", part["r"]
    if part["vera_d"] is not None:
        return {f"{prefix}.vera_B": draw(out, out), f"{prefix}.vera_D": draw(r, r)}
    count = len(part["attn_matrices"]) if path.endswith("c_attn") else 1
    out = out // 3 * count if path.endswith("c_attn") else out
    if part["composition_mode"] == "scale":
        return {f"{prefix}.lora_B": draw(out, 1) + 1}
    return {f"{prefix}.lora_A": draw(r * count, width), f"{prefix}.lora_B": draw(out, r)}


def _reft(part: Mapping[str, Any], model: nn.Module, draw: Draw) -> dict[str, Tensor]:
    layers, r = BLOCKS[model.config.model_type][0], part["r"]
    tensors: dict[str, Tensor] = {}
    for index in range(model.config.num_hidden_layers):
        for unit in range(1 if part["tied_weights"] else 2):
            if part["layers"] == "all" or index in part["layers"]:
                prefix = f"{layers}.{index}.reft_layer.refts.{NAME}.units.{unit}"
                tensors |= {f"{prefix}.learned_source.weight": draw(r, WIDTH), f"{prefix}.learned_source.bias": draw(r)}
                tensors |= _reft_projection(part, f"{prefix}.projection", draw)
    return tensors


def _reft_projection(part: Mapping[str, Any], prefix: str, draw: Draw) -> dict[str, Tensor]:
    """Orthogonal ones as torch's parametrization has them: the diagonal starts at -1."""
    if not part["orthogonality"]:
        return {f"{prefix}.weight": draw(part["r"], WIDTH)}
    base = torch.linalg.qr(draw(WIDTH, WIDTH)).Q
    original = draw(part["r"], WIDTH) - torch.eye(part["r"], WIDTH)
    return {f"{prefix}.parametrizations.weight.original": original, f"{prefix}.parametrizations.weight.0.base": base}


def _prefix(part: Mapping[str, Any], model: nn.Module, draw: Draw) -> dict[str, Tensor]:
    """With the copies that the library leaves under every layer."""
    layers, _, attention, *_ = BLOCKS[model.config.model_type]
    length, hidden = part["prefix_length"], part["bottleneck_size"]
    columns = model.config.num_hidden_layers * 2 * WIDTH
    if part["flat"]:
        own = {"control_trans": draw(length * columns) * 3}
    else:
        own = {"wte.weight": draw(length, WIDTH), "control_trans.0.weight": draw(hidden, WIDTH)}
        own |= {"control_trans.0.bias": draw(hidden), "control_trans.2.weight": draw(columns, hidden) * 3}
        own |= {"control_trans.2.bias": draw(columns)}
    places = [f"{layers}.{index}.{attention}.prefix_tuning.pool" for index in range(model.config.num_hidden_layers)]
    places.append(f"{layers.partition('.')[0]}.prefix_tuning")
    return {
        f"{place}.prefix_tunings.{NAME}.self_prefix.{key}": tensor.clone()
        for place in places
        for key, tensor in own.items()
    }

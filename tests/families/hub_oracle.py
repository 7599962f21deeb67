"""AdapterHub's methods recomputed in plain torch, by hooks on transformers' own modules, from the saved files alone.

Written from the methods' formulas and the library's documentation, before the compiler; nothing of OneBase is used.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache
from transformers.pytorch_utils import Conv1D

# layers, norm before attention, attention, norm before the feed-forward module, that module
LLAMA = ("model.layers", "input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
OPT = ("model.decoder.layers", "self_attn_layer_norm", "self_attn", "final_layer_norm", "")
BLOCKS = {
    "gemma2": LLAMA,
    "opt": OPT,
    "qwen3": LLAMA,
    "gpt2": ("transformer.h", "ln_1", "attn", "ln_2", "mlp"),
    "llama": LLAMA,
    "mistral": LLAMA,
}
ACTS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_new": lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "tanh": torch.tanh,
    "leakyrelu": lambda x: torch.where(x > 0, x, 0.01 * x),
}
Config = Mapping[str, Any]


@dataclass
class Oracle:
    """name: the adapter's; parts: its configurations; tensors: of its file."""

    name: str
    parts: list[Config]
    tensors: dict[str, Tensor]
    old: bool
    blocks: tuple[str, str, str, str, str]
    residuals: dict[str, Tensor] = field(default_factory=dict)
    length: int | None = None  # of the prompt; None: all tokens are the prompt

    def get(self, suffix: str) -> Tensor | None:
        found = [tensor for key, tensor in self.tensors.items() if f".{key}".endswith(f".{suffix}")]
        return found[0] if found else None

    def need(self, suffix: str) -> Tensor:
        tensor = self.get(suffix)
        assert tensor is not None, suffix
        return tensor

    def bottleneck(self, config: Config, place: str, z: Tensor) -> Tensor:
        """s up(act(down z)); place: ``3.output_adapters``."""
        prefix = f"{place}.adapters.{self.name}"
        act = config["non_linearity"]
        if self.old:
            act = {"gelu": "gelu_new", "gelu_orig": "gelu"}.get(act, act)
        inner = ACTS[act](self.project(config, f"{prefix}.adapter_down.0", "down", z))
        scale = config["scaling"]
        factor = scale if isinstance(scale, float) else self.need(f"{prefix}.scaling")
        return self.project(config, f"{prefix}.adapter_up", "up", inner) * factor

    def project(self, config: Config, prefix: str, position: str, z: Tensor) -> Tensor:
        if not config.get("phm_layer"):
            return z @ self.need(f"{prefix}.weight").T + self.need(f"{prefix}.bias")
        shared = f"shared_parameters.{self.name}"
        rule_at = f"{shared}.phm_rule" if config["shared_phm_rule"] else f"{prefix}.phm_rule"
        weight_at = f"{shared}.W_{position}" if config["shared_W_phm"] else f"{prefix}.W"
        rule, weight = self.product(rule_at), self.product(weight_at)
        n, rows, columns = weight.shape
        matrix = torch.einsum("nab,nij->aibj", rule, weight).reshape(n * rows, n * columns)
        bias = self.get(f"{prefix}.b")
        return z @ matrix if bias is None else z @ matrix + bias

    def product(self, at: str) -> Tensor:
        whole = self.get(at)
        return torch.bmm(self.need(f"{at}_left"), self.need(f"{at}_right")) if whole is None else whole

    def joined(self, config: Config, place: str, m: Tensor, r: Tensor) -> Tensor:
        """What the stream is after the block, the library's order of steps spelled out; no norm of the base's own."""
        if config["is_parallel"]:
            return self.bottleneck(config, place, r) + m + (r if config["original_ln_after"] else 0)
        z = m + r if config["original_ln_before"] else m
        kept = m if config["residual_before_ln"] else z
        return self.bottleneck(config, place, z) + kept + (r if config["original_ln_after"] else 0)

    def linear(self, config: Config, path: str, x: Tensor, y: Tensor) -> Tensor:
        """A linear module's output with the adapter's part."""
        prefix = f"{path}.loras.{self.name}"
        b = self.get(f"{prefix}.lora_B")
        vera = self.get(f"{prefix}.vera_B")
        matrices = [config["attn_matrices"].count(name) > 0 for name in "qkv"]
        fused = path.endswith("c_attn")
        if vera is not None:
            shared = f"shared_parameters.{self.name}"
            inner = x @ self.need(f"{shared}.lora_A").T @ self.need(f"{prefix}.vera_D").T
            return y + config["alpha"] / config["r"] * inner @ self.need(f"{shared}.lora_B").T @ vera.T
        if b is None:
            return y
        if config["composition_mode"] == "scale":
            return y * config["alpha"] * (_padded(b[:, 0], matrices, 1.0) if fused else b[:, 0])
        a = self.need(f"{prefix}.lora_A")
        alpha = config["r"] if config["version"].startswith("adapters.1.0") else config["alpha"]
        count = sum(matrices) if fused else 1
        parts = [x @ ai.T @ bi.T for ai, bi in zip(a.chunk(count), b.chunk(count), strict=True)]
        delta = torch.cat(parts, -1)
        return y + alpha / config["r"] * (_padded(delta, matrices, 0.0) if fused else delta)

    def unit(self, config: Config, at: str, h: Tensor) -> Tensor:
        """An intervention on rows h of a layer's output; at: ``3.reft_layer.refts.NAME.units.0``."""
        if config["orthogonality"]:
            weight = f"{at}.projection.parametrizations.weight"
            projection = _orthonormal(self.need(f"{weight}.original"), self.need(f"{weight}.0.base"))
        else:
            projection = self.need(f"{at}.projection.weight")
        inner = h @ self.need(f"{at}.learned_source.weight").T + self.need(f"{at}.learned_source.bias")
        if config["non_linearity"]:
            inner = ACTS[config["non_linearity"]](inner)
        if config.get("subtract_projection", True):
            inner = inner - h @ projection.T
        return h + inner @ projection

    def prefix(self, config: Config, num_layers: int, heads: int, width: int) -> Tensor:
        """[layers, 2, heads, length, width]"""
        at = f"prefix_tunings.{self.name}.self_prefix"
        if config["flat"]:
            flat = self.need(f"{at}.control_trans")
        else:
            inner = self.need(f"{at}.wte.weight") @ self.need(f"{at}.control_trans.0.weight").T
            inner = ACTS[config["non_linearity"]](inner + self.need(f"{at}.control_trans.0.bias"))
            flat = inner @ self.need(f"{at}.control_trans.2.weight").T + self.need(f"{at}.control_trans.2.bias")
        return flat.reshape(config["prefix_length"], num_layers, 2, heads, width).permute(1, 2, 3, 0, 4)


def _padded(parts: Tensor, matrices: list[bool], fill: float) -> Tensor:
    """Blocks of q, k, v that are there -> all three, the others filled."""
    blocks = iter(parts.chunk(sum(matrices), -1))
    width = parts.shape[-1] // sum(matrices)
    return torch.cat(
        [next(blocks) if has else parts.new_full((*parts.shape[:-1], width), fill) for has in matrices], -1
    )


def _orthonormal(original: Tensor, base: Tensor) -> Tensor:
    """torch's own parametrization over the saved tensors. original: [r, width]"""
    with torch.enable_grad():
        linear = nn.utils.parametrizations.orthogonal(nn.Linear(original.shape[1], original.shape[0], bias=False))
    parametrization: Any = linear.parametrizations["weight"]
    parametrization.original.data.copy_(original)
    parametrization[0].base.copy_(base)
    return linear.weight.detach()


@contextmanager
def hub_applied(folder: Path, model: nn.Module, length: int | None = None) -> Iterator[dict[str, Any]]:
    """The folder's adapter on the model. Gives what its forward needs besides. length: of the prompt, without what was
    generated; None: all of it."""
    config = json.loads((folder / "adapter_config.json").read_text())
    parts = config["config"].get("configs", [config["config"]])
    parts = [{**part, "version": config.get("version", "")} for part in parts]
    blocks = BLOCKS[model.config.model_type]
    oracle = Oracle(config["name"], parts, load_file(folder / "adapter.safetensors"), "version" not in config, blocks)
    oracle.length = length
    arguments: dict[str, Any] = {}
    with ExitStack() as stack:
        for part in parts:
            architecture = part.get("architecture")
            if architecture is None:
                _hook_blocks(oracle, part, model, stack)
            elif architecture == "reft":
                _hook_layers(oracle, part, model, stack)
            elif architecture == "lora":
                _hook_linears(oracle, part, model, stack)
            else:
                arguments |= _prefix_arguments(oracle, part, model)
        yield arguments


def _hook_blocks(oracle: Oracle, part: Config, model: nn.Module, stack: ExitStack) -> None:
    layers, norm_1, attention, norm_2, mlp = oracle.blocks
    for index, layer in enumerate(model.get_submodule(layers)):
        if index in part.get("leave_out", []):
            continue
        for used, norm, block, place in (
            ("mh_adapter", norm_1, attention, "attention_adapters"),
            ("output_adapter", norm_2, mlp, "output_adapters"),
        ):
            if part[used]:
                _hook_block(oracle, part, f"{index}.{place}", (getattr(layer, norm), getattr(layer, block)), stack)


def _hook_block(
    oracle: Oracle, part: Config, place: str, modules: tuple[nn.Module, nn.Module], stack: ExitStack
) -> None:
    def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        oracle.residuals[place] = args[0]

    def change(module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        m, r = out[0] if isinstance(out, tuple) else out, oracle.residuals[place]
        new = oracle.joined(part, place, m, r) - r  # the base adds r itself
        return (new, *out[1:]) if isinstance(out, tuple) else new

    norm, block = modules
    stack.callback(norm.register_forward_pre_hook(read, with_kwargs=True).remove)
    stack.callback(block.register_forward_hook(change).remove)


def _hook_layers(oracle: Oracle, part: Config, model: nn.Module, stack: ExitStack) -> None:
    for index, layer in enumerate(model.get_submodule(oracle.blocks[0])):
        if part["layers"] == "all" or index in part["layers"]:
            stack.callback(layer.register_forward_hook(_intervening(oracle, part, index)).remove)


def _intervening(oracle: Oracle, part: Config, index: int) -> Callable[..., Any]:
    at = f"{index}.reft_layer.refts.{oracle.name}.units"
    first, last = part["prefix_positions"], part["suffix_positions"]

    def change(module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        old = out[0] if isinstance(out, tuple) else out
        new = old.clone()
        prompt = old[:, : oracle.length]
        new[:, :first] = oracle.unit(part, f"{at}.0", prompt[:, :first])
        if last:  # after the first ones: where they overlap it counts
            end = slice(max(prompt.shape[1] - last, 0), prompt.shape[1])
            new[:, end] = oracle.unit(part, f"{at}.{0 if part['tied_weights'] else 1}", prompt[:, end])
        return (new, *out[1:]) if isinstance(out, tuple) else new

    return change


def _hook_linears(oracle: Oracle, part: Config, model: nn.Module, stack: ExitStack) -> None:
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            stack.callback(
                module.register_forward_hook(lambda m, args, y, path=path: oracle.linear(part, path, args[0], y)).remove
            )


def _prefix_arguments(oracle: Oracle, part: Config, model: nn.Module) -> dict[str, Any]:
    """Keys and values as a cache that is there before the first token, whose position stays 0."""
    config = model.config
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    table = oracle.prefix(part, layers, heads, config.hidden_size // heads)
    cache = DynamicCache()
    for index in range(layers):
        cache.update(table[index, 0][None], table[index, 1][None], index)
    return {"past_key_values": cache, "position_ids": torch.arange(21)[None]}

"""PEFT's ADAPTION_PROMPT: a gated prefix at the top layers. Zhang et al., LLaMA-Adapter (2303.16199).

With Kp, Vp = the layer's own projections of the trained prompt, P(x) = gate * softmax(q Kp / sqrt(d)) Vp and q as it
meets the real keys (rotated where those are):

    llama, mistral    attention output + o_proj(P), so o_proj's bias counts twice
    gpt2              attention output + P: PEFT leaves the output projection out
"""

from __future__ import annotations

from torch import Tensor

from onebase.adapters.base import BaseModel, Layer
from onebase.adapters.errors import AdapterRejected
from onebase.adapters.formats.fields import refused
from onebase.adapters.formats.files import AdapterFiles, TensorBag
from onebase.adapters.formats.keys import check_shape, group_by_site
from onebase.adapters.formats.register import Compiled, register
from onebase.adapters.program import SiteOps
from onebase.kernels.ops.prefix import GatedPrefix

PROMPT, GATE = "adaption_prompt", "adaption_gate"
MAX_LENGTH = 1 << 16
_PROJECTED = ("llama", "mistral")
_UNPROJECTED = ("gpt2",)


@register(
    "ADAPTION_PROMPT",
    title="LLaMA-Adapter",
    paper="2303.16199",
    covers=("LLaMA-Adapter",),
    instructions=("GatedPrefix", "AddOut"),
    cost="none at linears; 4 T h FLOPs and 2 T kv_dim elements a layer for a prompt of T",
    note="llama, mistral and gpt2, as in PEFT; keys and values of the prompt are computed at load",
)
def compile_adaption_prompt(files: AdapterFiles, base: BaseModel) -> Compiled:
    """Raises AdapterRejected naming the key or field."""
    model_type = base.config.get("model_type")
    if model_type not in _PROJECTED + _UNPROJECTED:
        message = f"PEFT has no adaption prompt for {model_type!r}: it has for llama, mistral and gpt2."
        raise AdapterRejected(message, param="peft_type")
    files.fields.ignore(("target_modules",))  # the tensors say which
    length = files.fields.integer("adapter_len", 1, MAX_LENGTH)
    count = files.fields.integer("adapter_layers", 1, len(base.layers))
    groups = group_by_site(files.tensors, base, (PROMPT, GATE))
    top = base.layers[-count:]
    if set(groups) != {layer.attention for layer in top}:
        raise refused("adapter_layers", count, f"the tensors adapt {len(groups)} layers; they must be the top {count}")
    ops: dict[str, SiteOps] = {}
    for layer in top:
        ops |= _layer_ops(layer, groups[layer.attention], files.tensors, base, length)
    return Compiled(ops)


def _layer_ops(
    layer: Layer, keys: dict[str, str], tensors: TensorBag, base: BaseModel, length: int
) -> dict[str, SiteOps]:
    prompt, gate = _take(layer, keys, tensors, base.sites[layer.attention].in_features, length)
    if base.config.get("model_type") in _UNPROJECTED:
        _, key, value = _project(prompt, f"{layer.attention}.c_attn", base).chunk(3, dim=-1)
        return {layer.attention: SiteOps(extra=(_prefix(layer, key, value, gate, projected=False),))}
    key, value = (_project(prompt, f"{layer.attention}.{name}", base) for name in ("k_proj", "v_proj"))
    if len(prompt[0]) // len(key[0]) * layer.num_kv_heads != layer.num_heads:
        raise AdapterRejected(
            f"{layer.attention} has {layer.num_heads} heads of {layer.head_dim} over a width of {len(prompt[0])}: PEFT "
            "has no adaption prompt for such heads.",
            param="peft_type",
        )
    ops = {layer.attention: SiteOps(extra=(_prefix(layer, key, value, gate, projected=True),))}
    bias = base.bias(f"{layer.attention}.o_proj")
    if bias is not None:
        ops[f"{layer.attention}.o_proj"] = SiteOps(add_out=bias.float().cpu())
    return ops


def _take(layer: Layer, keys: dict[str, str], tensors: TensorBag, width: int, length: int) -> tuple[Tensor, Tensor]:
    """prompt: [length, width]; gate: [1]"""
    for name in (PROMPT, GATE):
        if name not in keys:
            raise AdapterRejected(f"{layer.attention} needs a tensor {name!r}: half an adapter is refused.", param=name)
    check_shape(keys[PROMPT], tensors, (1, length, width), f"adapter_len {length}, the base's width")
    check_shape(keys[GATE], tensors, (1,), "one gate a layer")
    return tensors.take(keys[PROMPT])[0].float(), tensors.take(keys[GATE]).float()


def _project(prompt: Tensor, path: str, base: BaseModel) -> Tensor:
    """The base's own linear module over the prompt, in float32: [length, out_features]."""
    if path not in base.sites:
        raise AdapterRejected(f"The base has no linear module {path}, which the prompt goes through.", param=path)
    bias = base.bias(path)
    projected = prompt @ base.weight(path).float().cpu().T
    return projected if bias is None else projected + bias.float().cpu()


def _prefix(layer: Layer, key: Tensor, value: Tensor, gate: Tensor, *, projected: bool) -> GatedPrefix:
    keys, values = (t.reshape(len(t), layer.num_kv_heads, layer.head_dim).contiguous() for t in (key, value))
    return GatedPrefix(keys, values, gate, projected=projected)

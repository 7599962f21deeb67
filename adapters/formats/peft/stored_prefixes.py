"""PEFT's stored prefixes: keys and values of every layer that stand before the sequence.

PREFIX_TUNING, Li and Liang (2101.00190); CARTRIDGE, Eyuboglu et al. (2506.06266). The file holds
[num_virtual_tokens, 2 * layers * kv_heads * head_dim]: of each layer the keys, then the values, used as they are (no
rotation). A prefix_projection has been applied when PEFT saved. Real tokens start at position num_virtual_tokens.
"""

from __future__ import annotations

from onebase.adapters.base import BaseModel
from onebase.adapters.errors import AdapterRejected
from onebase.adapters.formats.files import AdapterFiles
from onebase.adapters.formats.heads import take_head
from onebase.adapters.formats.keys import check_shape
from onebase.adapters.formats.peft.soft_prompts import KEY, read_prompt_length, require_key
from onebase.adapters.formats.register import Compiled, register
from onebase.adapters.program import SiteOps
from onebase.kernels.ops.prefix import KvPrefix

_COST = "none at linears; attention over num_virtual_tokens more slots"


@register(
    "PREFIX_TUNING",
    title="Prefix tuning",
    paper="2101.00190",
    covers=("Prefix-tuning", "Prefix"),
    instructions=("KvPrefix",),
    cost=_COST,
    note="with or without prefix_projection",
)
def compile_prefix_tuning(files: AdapterFiles, base: BaseModel) -> Compiled:
    """Raises AdapterRejected naming the key or field."""
    files.fields.ignore(("encoder_hidden_size", "init_weights", "prefix_projection"))  # how the file came to be
    return _compile(files, base)


@register("CARTRIDGE", title="Cartridges", paper="2506.06266", instructions=("KvPrefix",), cost=_COST)
def compile_cartridge(files: AdapterFiles, base: BaseModel) -> Compiled:
    """Raises AdapterRejected naming the key or field."""
    files.fields.ignore(("num_frozen_tokens",))  # which of them were trained
    return _compile(files, base)


def _compile(files: AdapterFiles, base: BaseModel) -> Compiled:
    kv_heads, head_dim = _kv_shape(base)
    num_layers = len(base.layers)
    shape = {"num_layers": num_layers, "num_attention_heads": kv_heads, "token_dim": kv_heads * head_dim}
    for name, value in shape.items():
        files.fields.choice(name, (value, None), None, f"the base's keys and values need {value}")
    length = read_prompt_length(files.fields)
    require_key(files.tensors, KEY)
    meaning = f"num_virtual_tokens, 2 x {num_layers} layers x {kv_heads} key-value heads x {head_dim}"
    check_shape(KEY, files.tensors, (length, 2 * num_layers * kv_heads * head_dim), meaning)
    stored = files.tensors.take(KEY).float().view(length, num_layers, 2, kv_heads, head_dim)
    ops = {
        layer.attention: SiteOps(extra=(KvPrefix(stored[:, at, 0].contiguous(), stored[:, at, 1].contiguous()),))
        for at, layer in enumerate(base.layers)
    }
    return Compiled(ops, length, first_position=length, head=take_head(files, base))


def _kv_shape(base: BaseModel) -> tuple[int, int]:
    """(kv_heads, head_dim) of every layer. AdapterRejected where PEFT lays a prefix out in another way."""
    model_type = base.config.get("model_type")
    if model_type == "gpt_bigcode":
        message = f"A prefix of {model_type} has a layout of its own, which is not served."
        raise AdapterRejected(message, param="peft_type")
    shapes = {(layer.num_kv_heads, layer.head_dim) for layer in base.layers}
    if len(shapes) != 1:
        raise AdapterRejected(
            f"The base's layers have keys of {len(shapes)} shapes: PEFT leaves the prefix out of some of them, which "
            "is not served.",
            param="peft_type",
        )
    return shapes.pop()

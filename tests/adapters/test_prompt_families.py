"""Prompt and prefix adapters that are broken, hostile, or that PEFT computes in another way: refused by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from onebase.adapters.base import Layer, Site, SiteKind
from onebase.adapters.errors import AdapterRejected
from onebase.adapters.formats import compile_folder
from onebase.adapters.program import AdapterProgram
from onebase.kernels.ops.prefix import GatedPrefix, KvPrefix
from onebase.kernels.ops.tokens import SoftPrompt

from .conftest import TinyBase, make_model

WIDTH, LENGTH, KV = 32, 5, 2 * 2 * 2 * 8  # two layers, keys and values, two heads of 8
ATTENTION = "model.layers.{}.self_attn"
LAYERS = tuple(Layer(ATTENTION.format(at), f"model.layers.{at}.mlp", 4, 2, 8, 8**-0.5) for at in range(2))


class LayeredBase(TinyBase):
    """With its layers, and their attention modules as sites."""

    layers: tuple[Layer, ...] = LAYERS

    def __init__(self, model: nn.Module, layers: tuple[Layer, ...] = LAYERS, model_type: str = "llama") -> None:
        super().__init__(model)
        self.layers, self.model_type = layers, model_type
        for layer in layers:
            self.sites[layer.attention] = Site(layer.attention, SiteKind.ATTENTION, WIDTH, WIDTH)

    @property
    def config(self) -> dict[str, Any]:
        return {**super().config, "model_type": self.model_type}


SOFT = {"num_virtual_tokens": LENGTH, "num_transformer_submodules": 1, "task_type": "CAUSAL_LM"}
ROWS, TABLE = {"prompt_embeddings": torch.ones(LENGTH, WIDTH)}, {"prompt_embeddings": torch.ones(LENGTH, KV)}
TASKS = ROWS | {"prefix_task_cols": torch.ones(3, LENGTH, 2), "prefix_task_rows": torch.ones(3, 2, WIDTH)}
KEYS = [f"base_model.model.{ATTENTION.format(at)}.adaption_" for at in range(2)]
TOP = {f"{KEYS[1]}prompt": torch.ones(1, LENGTH, WIDTH), f"{KEYS[1]}gate": torch.ones(1)}
FOLDERS: dict[str, tuple[dict[str, Any], dict[str, Tensor]]] = {
    "PROMPT_TUNING": (SOFT, ROWS),
    "P_TUNING": (SOFT | {"encoder_hidden_size": 9, "encoder_num_layers": 2}, ROWS),
    "CPT": (SOFT | {"cpt_token_ids": [1] * LENGTH, "opt_projection_epsilon": 0.1}, ROWS),
    "MULTITASK_PROMPT_TUNING": (SOFT | {"num_tasks": 3, "num_ranks": 2}, TASKS),
    "PREFIX_TUNING": (SOFT | {"prefix_projection": True, "encoder_hidden_size": 7}, TABLE),
    "CARTRIDGE": (SOFT | {"num_frozen_tokens": 1}, TABLE),
    "ADAPTION_PROMPT": ({"adapter_len": LENGTH, "adapter_layers": 1, "target_modules": "self_attn"}, TOP),
}


@pytest.fixture
def base(llama: nn.Module) -> LayeredBase:
    return LayeredBase(llama)


def _compile(folder: Path, family: str, base: TinyBase, config: Any = None, tensors: Any = None) -> AdapterProgram:
    """The family's sound folder with these fields and tensors in place of its own; None takes one away."""
    fields, given = FOLDERS[family]
    fields = {"peft_type": family, **fields, **(config or {})}
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    kept = {key: tensor.contiguous() for key, tensor in {**given, **(tensors or {})}.items() if tensor is not None}
    save_file(kept, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return compile_folder(folder, base, "digest")


@pytest.mark.parametrize("family", FOLDERS)
def test_sound_ones_compile(family: str, base: LayeredBase, tmp_path: Path) -> None:
    program = _compile(tmp_path / "a", family, base)
    kinds = {type(item) for ops in program.ops.values() for item in ops.extra}
    if family == "ADAPTION_PROMPT":
        assert kinds == {GatedPrefix}
        assert program.num_virtual_tokens == 0
        assert torch.equal(
            program.ops[f"{LAYERS[1].attention}.o_proj"].add_out, base.bias(LAYERS[1].attention + ".o_proj")
        )
    else:
        assert kinds == {KvPrefix if family in ("PREFIX_TUNING", "CARTRIDGE") else SoftPrompt}
        assert program.num_virtual_tokens == program.first_position == LENGTH


SOFT_FAMILIES = [name for name in FOLDERS if name != "ADAPTION_PROMPT"]
FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "no length": ({"num_virtual_tokens": None}, "num_virtual_tokens"),
    "zero": ({"num_virtual_tokens": 0}, "integer from 1"),
    "other length": ({"num_virtual_tokens": LENGTH + 1}, "num_virtual_tokens"),
    "huge": ({"num_virtual_tokens": 1 << 40}, "integer from 1"),
    "text": ({"num_virtual_tokens": "5"}, "integer from 1"),
    "encoder-decoder": ({"num_transformer_submodules": 2}, "encoder-decoder"),
    "saved modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "unknown field": ({"num_virtual_heads": 3}, "unknown and set"),
}


@pytest.mark.parametrize("case", FIELDS)
@pytest.mark.parametrize("family", SOFT_FAMILIES)
def test_fields_are_refused_by_name(family: str, case: str, base: LayeredBase, tmp_path: Path) -> None:
    config, message = FIELDS[case]
    with pytest.raises(AdapterRejected, match=message):
        _compile(tmp_path / "a", family, base, config)


@pytest.mark.parametrize("family", SOFT_FAMILIES)
def test_tensors_have_to_fit(family: str, base: LayeredBase, tmp_path: Path) -> None:
    wide = torch.ones(LENGTH, FOLDERS[family][1]["prompt_embeddings"].shape[1] + 1)
    for changes, message in [
        ({"prompt_embeddings": wide}, "prompt_embeddings.*shape"),
        ({"prompt_embeddings": wide[0]}, "prompt_embeddings.*shape"),
        ({"prompt_embeddings": None, "other": wide}, "prompt_embeddings"),
        ({"other": wide}, "no meaning"),
        ({"prompt_embeddings": wide[:, :-1] * torch.nan}, "prompt_embeddings"),
    ]:
        with pytest.raises(AdapterRejected, match=message):
            _compile(tmp_path / "a", family, base, tensors=changes)


MULTITASK: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "other rank": ({"num_ranks": 3}, {}, "num_ranks"),
    "other tasks": ({"num_tasks": 2}, {}, "num_tasks"),
    "no tasks": ({"num_tasks": 0}, {}, "num_tasks"),
    "no rows": ({}, {"prefix_task_rows": None}, "prefix_task_rows"),
    "short columns": ({}, {"prefix_task_cols": torch.ones(3, LENGTH - 1, 2)}, "prefix_task_cols"),
}


@pytest.mark.parametrize("case", MULTITASK)
def test_multitask_factors_have_to_fit(case: str, base: LayeredBase, tmp_path: Path) -> None:
    config, tensors, message = MULTITASK[case]
    with pytest.raises(AdapterRejected, match=message):
        _compile(tmp_path / "a", "MULTITASK_PROMPT_TUNING", base, config, tensors)


def test_cpt_has_a_virtual_token_for_each_of_its_tokens(base: LayeredBase, tmp_path: Path) -> None:
    with pytest.raises(AdapterRejected, match="cpt_token_ids"):
        _compile(tmp_path / "a", "CPT", base, {"cpt_token_ids": [1, 2]})


def test_a_prompt_needs_an_embedding_over_the_vocabulary(base: LayeredBase, tmp_path: Path) -> None:
    del base.sites["model.embed_tokens"]
    with pytest.raises(AdapterRejected, match="embedding"):
        _compile(tmp_path / "a", "PROMPT_TUNING", base)


@pytest.mark.parametrize("name", ["num_layers", "num_attention_heads", "token_dim"])
def test_prefixes_are_cut_as_peft_cuts_them(name: str, base: LayeredBase, tmp_path: Path) -> None:
    right = {"num_layers": 2, "num_attention_heads": 2, "token_dim": 16}
    _compile(tmp_path / "a", "PREFIX_TUNING", base, right)
    with pytest.raises(AdapterRejected, match=name):
        _compile(tmp_path / "a", "PREFIX_TUNING", base, right | {name: right[name] * 2})


def test_prefixes_need_layers_that_are_alike(llama: nn.Module, tmp_path: Path) -> None:
    mixed = (LAYERS[0], dataclasses.replace(LAYERS[1], num_kv_heads=4))
    for base in (LayeredBase(llama, mixed), LayeredBase(llama, model_type="gpt_bigcode")):
        with pytest.raises(AdapterRejected, match=r"shapes|layout"):
            _compile(tmp_path / "a", "PREFIX_TUNING", base)


ADAPTION: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "lower layer": ({}, {f"{KEYS[0]}gate": torch.ones(1), f"{KEYS[0]}prompt": torch.ones(1, LENGTH, WIDTH)}, "top 1"),
    "more layers": ({"adapter_layers": 2}, {}, "top 2"),
    "too many layers": ({"adapter_layers": 3}, {}, "integer from 1 to 2"),
    "no gate": ({}, {f"{KEYS[1]}gate": None}, "adaption_gate"),
    "no prompt": ({}, {f"{KEYS[1]}prompt": None}, "adaption_prompt"),
    "other length": ({"adapter_len": LENGTH + 1}, {}, "adapter_len"),
    "huge": ({"adapter_len": 1 << 30}, {}, "adapter_len"),
    "two gates": ({}, {f"{KEYS[1]}gate": torch.ones(2)}, "one gate"),
    "other width": ({}, {f"{KEYS[1]}prompt": torch.ones(1, LENGTH, WIDTH + 1)}, "width"),
}


@pytest.mark.parametrize("case", ADAPTION)
def test_adaption_prompts_have_to_fit(case: str, base: LayeredBase, tmp_path: Path) -> None:
    config, tensors, message = ADAPTION[case]
    with pytest.raises(AdapterRejected, match=message):
        _compile(tmp_path / "a", "ADAPTION_PROMPT", base, config, tensors)


def test_adaption_prompts_are_for_the_models_that_peft_knows(llama: nn.Module, tmp_path: Path) -> None:
    odd = tuple(dataclasses.replace(layer, num_heads=8) for layer in LAYERS)
    for base, message in [(LayeredBase(llama, model_type="qwen3"), "qwen3"), (LayeredBase(llama, odd), "such heads")]:
        with pytest.raises(AdapterRejected, match=message):
            _compile(tmp_path / "a", "ADAPTION_PROMPT", base)


def test_gpt2_gets_no_output_projection(tmp_path: Path) -> None:
    layers = tuple(Layer(f"transformer.h.{at}.attn", None, 4, 4, 8, 8**-0.5) for at in range(2))
    base = LayeredBase(make_model("gpt2"), layers, "gpt2")
    renamed = {key.replace(ATTENTION.format(1), layers[1].attention): tensor for key, tensor in TOP.items()}
    program = _compile(tmp_path / "a", "ADAPTION_PROMPT", base, tensors=dict.fromkeys(TOP) | renamed)
    (op,) = program.ops[layers[1].attention].extra
    assert isinstance(op, GatedPrefix)
    assert not op.projected
    assert set(program.ops) == {layers[1].attention}

"""AdapterHub's folders that are broken, or hold what cannot be served exactly: each is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from onebase.adapters.base import Layer, Site, SiteKind
from onebase.adapters.errors import AdapterRejected
from onebase.adapters.formats import compile_folder
from onebase.adapters.program import AdapterProgram
from onebase.kernels.ops.bottleneck import BlockBottleneck

from .conftest import TinyBase, make_model

WIDTH, RANK = 32, 4
DOWN = "model.layers.0.output_adapters.adapters.task.adapter_down.0.weight"
LORA_B = "model.layers.1.self_attn.q_proj.loras.task.lora_B"
POOL = "model.layers.0.self_attn.prefix_tuning.pool.prefix_tunings.task.self_prefix.control_trans"
BOTTLENECK: dict[str, Any] = {
    "mh_adapter": False,
    "output_adapter": True,
    "original_ln_before": True,
    "original_ln_after": True,
    "residual_before_ln": True,
    "reduction_factor": 8,
    "non_linearity": "relu",
    "scaling": 1.0,
    "leave_out": [],
}
LORA = {"architecture": "lora", "r": 2, "alpha": 4, "attn_matrices": ["q"], "composition_mode": "add"}
PREFIX = {"architecture": "prefix_tuning", "flat": True, "prefix_length": 3, "bottleneck_size": 4}


class LayeredBase(TinyBase):
    """With the layers' blocks."""

    def __init__(self, model: nn.Module, *, num_kv_heads: int = 4) -> None:
        super().__init__(model)
        for path, _ in model.named_modules():
            if path.endswith((".self_attn", ".mlp")):
                kind = SiteKind.MLP if path.endswith("mlp") else SiteKind.ATTENTION
                self.sites[path] = Site(path, kind, WIDTH, WIDTH)
        paths = [f"model.layers.{index}" for index in range(2)]
        self.layers = [Layer(f"{p}.self_attn", f"{p}.mlp", 4, num_kv_heads, 8, 8**-0.5) for p in paths]


def bottleneck_tensors() -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for layer in range(2):
        prefix = f"model.layers.{layer}.output_adapters.adapters.task"
        tensors |= {f"{prefix}.adapter_down.0.weight": torch.randn(RANK, WIDTH)}
        tensors |= {f"{prefix}.adapter_down.0.bias": torch.randn(RANK)}
        tensors |= {f"{prefix}.adapter_up.weight": torch.randn(WIDTH, RANK)}
        tensors |= {f"{prefix}.adapter_up.bias": torch.randn(WIDTH)}
    return tensors


def lora_tensors() -> dict[str, Tensor]:
    paths = [f"model.layers.{layer}.self_attn.q_proj.loras.task" for layer in range(2)]
    tensors = {f"{path}.lora_A": torch.randn(2, WIDTH) for path in paths}
    return tensors | {f"{path}.lora_B": torch.randn(WIDTH, 2) for path in paths}


def prefix_tensors() -> dict[str, Tensor]:
    prefix = torch.randn(3 * 2 * 2 * WIDTH)
    return {POOL: prefix, "model.prefix_tuning.prefix_tunings.task.self_prefix.control_trans": prefix.clone()}


KINDS: dict[str, tuple[dict[str, Any], Callable[[], dict[str, Tensor]]]] = {
    "bottleneck": (BOTTLENECK, bottleneck_tensors),
    "lora": (LORA, lora_tensors),
    "prefix": (PREFIX, prefix_tensors),
}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """write(kind, changes of the nested config, changes of the outer one) -> a folder; ``...`` removes a field."""

    def make(kind: str, nested: dict[str, Any] | None = None, **outer: Any) -> Path:
        config, tensors = KINDS[kind]
        inner = {key: value for key, value in (config | (nested or {})).items() if value is not ...}
        whole = {"config": inner, "name": "task", "version": "adapters.1.2.0", "model_type": "llama"} | outer
        (tmp_path / "adapter_config.json").write_text(json.dumps({k: v for k, v in whole.items() if v is not ...}))
        save_file(tensors(), tmp_path / "adapter.safetensors")
        return tmp_path

    return make


def change(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / "adapter.safetensors")
    edit(tensors)
    save_file(tensors, folder / "adapter.safetensors")


def compiled(folder: Path, llama: nn.Module, **options: Any) -> AdapterProgram:
    return compile_folder(folder, LayeredBase(llama, **options), "d")


@pytest.mark.parametrize("kind", KINDS)
def test_sound_folders_compile(kind: str, write: Callable[..., Path], llama: nn.Module) -> None:
    program = compiled(write(kind), llama)
    assert program.ops.keys() == {
        f"model.layers.{layer}.{'mlp' if kind == 'bottleneck' else 'self_attn'}{'.q_proj' if kind == 'lora' else ''}"
        for layer in range(2)
    }
    assert (program.num_virtual_tokens, program.first_position) == ((3, 0) if kind == "prefix" else (0, 0))


def test_a_model_saved_without_its_head_has_shorter_keys(write: Callable[..., Path], llama: nn.Module) -> None:
    def shorten(tensors: dict[str, Tensor]) -> None:
        for key in list(tensors):
            tensors[key.removeprefix("model.")] = tensors.pop(key)

    for kind in KINDS:
        folder = write(kind)
        expected = compiled(folder, llama).ops.keys()
        change(folder, shorten)
        assert compiled(folder, llama).ops.keys() == expected


FIELDS: dict[str, tuple[str, dict[str, Any], str]] = {
    "gating": ("bottleneck", {"use_gating": True}, "use_gating.*whole sequence"),
    "gated lora": ("lora", {"use_gating": True}, "use_gating.*whole sequence"),
    "gated prefix": ("prefix", {"use_gating": True}, "use_gating.*whole sequence"),
    "invertible": ("bottleneck", {"inv_adapter": "nice"}, "inv_adapter.*embeddings"),
    "norm before": ("bottleneck", {"ln_before": True}, "ln_before"),
    "norm after": ("bottleneck", {"ln_after": True}, "ln_after"),
    "residual lost": ("bottleneck", {"original_ln_after": False}, "original_ln_after.*lost"),
    "residual twice": ("bottleneck", {"residual_before_ln": False}, "original_ln_after.*twice"),
    "residual lost in parallel": ("bottleneck", {"is_parallel": True, "original_ln_after": False}, "lost"),
    "residual after the sum": ("bottleneck", {"residual_before_ln": "post_add"}, "residual_before_ln.*post_add"),
    "activation": ("bottleneck", {"non_linearity": "mish"}, "non_linearity.*mish.*served are"),
    "activation no string": ("bottleneck", {"non_linearity": ["relu"]}, "non_linearity"),
    "scaling": ("bottleneck", {"scaling": "huge"}, "scaling"),
    "scaling without a tensor": ("bottleneck", {"scaling": "learned"}, "needs a tensor 'scaling'"),
    "reduction zero": ("bottleneck", {"reduction_factor": 0}, "reduction_factor.*above 0"),
    "reduction tiny": ("bottleneck", {"reduction_factor": 1e-9}, "over 4096 wide"),
    "reduction missing": ("bottleneck", {"reduction_factor": ...}, "reduction_factor"),
    "reduction without a default": ("bottleneck", {"reduction_factor": {"0": 8}}, "neither layer 1 nor a default"),
    "reduction of the tensors": ("bottleneck", {"reduction_factor": 4}, r"adapter_down.*\(4, 32\).*\(8, 32\)"),
    "more places": ("bottleneck", {"mh_adapter": True}, "self_attn, and no tensor is there"),
    "layer left out": ("bottleneck", {"leave_out": [1]}, "has no meaning"),
    "left out no list": ("bottleneck", {"leave_out": "1"}, "leave_out"),
    "unknown": ("bottleneck", {"use_magic": True}, "use_magic"),
    "phm of no divisor": ("bottleneck", {"phm_layer": True, "phm_dim": 5, "phm_rank": 1}, "phm_dim 5 divides"),
    "phm huge": ("bottleneck", {"phm_layer": True, "phm_dim": 65, "phm_rank": 1}, "phm_dim"),
    "phm without tensors": ("bottleneck", {"phm_layer": True, "phm_dim": 2, "phm_rank": 1}, "shared_parameters"),
    "rank": ("lora", {"r": 3}, r"lora_A.*\(2, 32\).*\(3, 32\)"),
    "rank zero": ("lora", {"r": 0}, "'r'"),
    "alpha missing": ("lora", {"alpha": ...}, "no alpha"),
    "composition": ("lora", {"composition_mode": "xor"}, "composition_mode"),
    "scale of a rank": ("lora", {"composition_mode": "scale"}, "composition_mode.*r 1"),
    "matrices": ("lora", {"attn_matrices": ["o"]}, "attn_matrices"),
    "vera without tensors": ("lora", {"vera_d": 0.1}, "vera_B"),
    "prefix length": ("prefix", {"prefix_length": 4}, r"control_trans.*\(384,\).*\(512,\)"),
    "prefix length huge": ("prefix", {"prefix_length": 1 << 20}, "prefix_length"),
    "prefix in some layers": ("prefix", {"leave_out": [0]}, "leave_out.*all or none"),
    "prefix not flat": ("prefix", {"flat": False}, "wte"),
}


@pytest.mark.parametrize("case", FIELDS)
def test_config_fields(case: str, write: Callable[..., Path], llama: nn.Module) -> None:
    kind, nested, message = FIELDS[case]
    with pytest.raises(AdapterRejected, match=message):
        compiled(write(kind, nested), llama)


TENSORS: dict[str, tuple[str, Callable[[dict[str, Tensor]], Any], str]] = {
    "half": ("bottleneck", lambda t: t.pop(DOWN), "adapter_down.0.weight.*half an adapter"),
    "half of lora": ("lora", lambda t: t.pop(LORA_B), "needs a tensor 'lora_B'"),
    "no such layer": (
        "bottleneck",
        lambda t: t.update({DOWN.replace("layers.0", "layers.7"): torch.ones(4, 32)}),
        "layers.7.*no such layer",
    ),
    "no such module": (
        "lora",
        lambda t: t.update({LORA_B.replace("q_proj", "z_proj"): torch.ones(32, 2)}),
        "z_proj.*no such module",
    ),
    "lora on a norm": ("lora", lambda t: t.update({"model.norm.loras.task.lora_B": torch.ones(1)}), "no linear module"),
    "one module in two spellings": (
        "lora",
        lambda t: t.update({key.removeprefix("model."): tensor.clone() for key, tensor in t.items()}),
        "others do so too",
    ),
    "one block in two spellings": (
        "bottleneck",
        lambda t: t.update({key.removeprefix("model."): tensor.clone() for key, tensor in t.items()}),
        "has no meaning",
    ),
    "another name": ("lora", lambda t: t.update({LORA_B.replace("task", "mask"): torch.ones(32, 2)}), "no meaning"),
    "copies that differ": ("prefix", lambda t: t[POOL].add_(1), "differs from another copy"),
    "no prefix": ("prefix", lambda t: t.clear() or t.update({"x": torch.ones(1)}), "no tensor is named"),
    "head of its own": ("lora", lambda t: t.update({"heads.task.1.weight": torch.ones(2, 32)}), "prediction head"),
    "trained head": ("lora", lambda t: t.update({"lm_head.weight": torch.ones(64, 32)}), "differs from the base"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors(case: str, write: Callable[..., Path], llama: nn.Module) -> None:
    kind, edit, message = TENSORS[case]
    folder = write(kind)
    change(folder, edit)
    with pytest.raises(AdapterRejected, match=message):
        compiled(folder, llama)


OUTER: dict[str, tuple[dict[str, Any], str]] = {
    "name missing": ({"name": ...}, "'name'"),
    "name with dots": ({"name": "a.b"}, "'name'"),
    "other name": ({"name": "mask"}, "no tensor is there"),
    "unknown": ({"use_magic": True}, "use_magic"),
    "union of nothing": ({"config": {"architecture": "union", "configs": []}}, "1 to 8 configurations"),
    "union of strings": ({"config": {"architecture": "union", "configs": ["lora"]}}, "must be an object"),
    "union of unions": ({"config": {"architecture": "union", "configs": [{"architecture": "union"}]}}, "architecture"),
    "union of equals": ({"config": {"architecture": "union", "configs": [LORA, LORA]}}, "once"),
    "union that meets": (
        {"config": {"architecture": "union", "configs": [BOTTLENECK, BOTTLENECK]}},
        "Two configurations put an adapter into output_adapters of layer 0",
    ),
}


@pytest.mark.parametrize("case", OUTER)
def test_the_file_around_the_config(case: str, write: Callable[..., Path], llama: nn.Module) -> None:
    outer, message = OUTER[case]
    with pytest.raises(AdapterRejected, match=message):
        compiled(write("bottleneck", **outer), llama)


def test_bases_for_which_the_library_does_otherwise(write: Callable[..., Path], llama: nn.Module) -> None:
    with pytest.raises(AdapterRejected, match="for every query head"):
        compiled(write("prefix"), llama, num_kv_heads=2)
    gemma = make_model("gemma")
    for kind in ("bottleneck", "prefix"):
        with pytest.raises(AdapterRejected, match=r"not served on.*gemma3_text"):
            compile_folder(write(kind), LayeredBase(gemma), "d")


def test_files_without_a_version_call_gelu_by_its_old_names(write: Callable[..., Path], llama: nn.Module) -> None:
    for version, name, expected in (
        (..., "gelu", "gelu_new"),
        (..., "gelu_orig", "gelu"),
        ("adapters.1.0", "gelu", "gelu"),
    ):
        program = compiled(write("bottleneck", {"non_linearity": name}, version=version), llama)
        (op,) = program.ops["model.layers.0.mlp"].extra
        assert isinstance(op, BlockBottleneck)
        assert op.activation == expected


def test_alpha_of_faulty_versions_is_the_rank(write: Callable[..., Path], llama: nn.Module) -> None:
    for version, scale in (("adapters.1.0.1", 1.0), ("adapters.1.1.0", 2.0), (..., 2.0)):
        program = compiled(write("lora", version=version), llama)
        low_rank = program.ops["model.layers.0.self_attn.q_proj"].low_rank
        assert low_rank is not None
        assert low_rank.scale == scale


@pytest.mark.parametrize("name", ["adapter_fusion_config.json", "model_adapter_fusion.safetensors"])
def test_fusions_are_refused_by_name(name: str, write: Callable[..., Path], llama: nn.Module) -> None:
    folder = write("bottleneck")
    (folder / name).write_text("{}")
    with pytest.raises(AdapterRejected, match="AdapterFusion"):
        compiled(folder, llama)

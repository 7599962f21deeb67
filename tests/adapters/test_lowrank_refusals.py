"""Broken and hostile adapters of the low-rank, shared, Kronecker and dense families are refused by name."""

from __future__ import annotations

import copy
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import peft
import pytest
import torch
from torch import Tensor, nn

from onebase.adapters.errors import AdapterRejected, AdapterTooLarge
from onebase.adapters.formats import compile_folder
from onebase.adapters.formats.fields import Fields
from onebase.adapters.formats.targeting import read_targets
from onebase.adapters.program import AdapterProgram

from .conftest import TinyBase, edit_config, edit_tensors

Tensors: TypeAlias = dict[str, Tensor]
Change: TypeAlias = Callable[[Tensors], Any]
TARGETS = ["q_proj", "up_proj"]  # 32 -> 32 and 32 -> 48
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
EMBED = "base_model.model.model.embed_tokens"

CONFIGS: dict[str, Callable[[], Any]] = {
    "loha": lambda: peft.LoHaConfig(r=2, target_modules=TARGETS),
    "lokr": lambda: peft.LoKrConfig(r=2, target_modules=TARGETS),
    "vera": lambda: peft.VeraConfig(r=4, target_modules=TARGETS),
    "vera-seed": lambda: peft.VeraConfig(r=4, target_modules=TARGETS, save_projection=False),
    "pvera": lambda: peft.PveraConfig(r=4, target_modules=TARGETS),
    "randlora": lambda: peft.RandLoraConfig(r=6, target_modules=TARGETS),
    "vblora": lambda: peft.VBLoRAConfig(r=2, num_vectors=10, vector_length=16, target_modules=TARGETS),
    "vblora-topk": lambda: peft.VBLoRAConfig(
        r=2, num_vectors=10, vector_length=16, topk=3, target_modules=TARGETS, save_only_topk_weights=True
    ),
    "unilora": lambda: peft.UniLoraConfig(r=2, theta_d_length=50, target_modules=TARGETS),
    "unilora-saved": lambda: peft.UniLoraConfig(r=2, theta_d_length=50, target_modules=TARGETS, save_indices=True),
    "tinylora": lambda: peft.TinyLoraConfig(r=2, u=3, target_modules=[*TARGETS, "embed_tokens"]),
    "delora": lambda: peft.DeloraConfig(r=2, target_modules=TARGETS),
    "gralora": lambda: peft.GraloraConfig(r=4, gralora_k=2, hybrid_r=1, target_modules=TARGETS),
    "poly": lambda: peft.PolyConfig(r=2, n_tasks=2, n_skills=3, n_splits=2, target_modules=TARGETS),
    "hira": lambda: peft.HiraConfig(r=2, target_modules=[*TARGETS, "embed_tokens"]),
    "glora": lambda: peft.GloraConfig(r=2, target_modules=TARGETS, config_C="lora", config_D_E="vector"),
    "glora-none": lambda: peft.GloraConfig(r=2, target_modules=TARGETS, config_A_B="none", config_D_E="vector"),
}


@pytest.fixture(scope="module")
def made(llama: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One sound adapter of each configuration, by PEFT."""
    root = tmp_path_factory.mktemp("lowrank")
    for name, config in CONFIGS.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = peft.get_peft_model(copy.deepcopy(llama), config())
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.data += 0.1
            adapted.save_pretrained(root / name)
        (root / name / "README.md").unlink(missing_ok=True)
    return {name: root / name for name in CONFIGS}


@pytest.fixture
def folder(made: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(made[name], tmp_path / name))


def compile_for(path: Path, llama: nn.Module) -> AdapterProgram:
    return compile_folder(path, TinyBase(llama), "digest")


@pytest.mark.parametrize("name", CONFIGS)
def test_what_peft_writes_is_compiled(name: str, folder: Callable[[str], Path], llama: nn.Module) -> None:
    program = compile_for(folder(name), llama)
    assert len(program.ops) == 4 + (name in ("tinylora", "hira"))


FIELDS: dict[str, tuple[str, dict[str, Any], str]] = {
    "loha rank zero": ("loha", {"r": 0}, "'r'"),
    "loha rank of tensors": ("loha", {"r": 3}, r"hada_w1_a.*rank 3"),
    "loha rank pattern float": ("loha", {"rank_pattern": {"q_proj": 1.5}}, "rank_pattern"),
    "loha rank pattern huge": ("loha", {"rank_pattern": {"q_proj": 5000}}, "rank_pattern"),
    "loha alpha missing": ("loha", {"alpha": ...}, "no alpha"),
    "loha alpha text": ("loha", {"alpha_pattern": {"q_proj": "8"}}, "alpha_pattern"),
    "lokr rank of factors": ("lokr", {"r": 3}, r"lokr_w2_a.*rank 3"),
    "lokr form of the first": ("lokr", {"decompose_both": True}, "lokr_w1 of .* must be the product of two"),
    "lokr form of the second": ("lokr", {"r": 4}, "lokr_w2 of .* must be whole"),
    "lokr alpha": ("lokr", {"alpha": None}, "alpha"),
    "vera rank": ("vera", {"r": 5}, r"vera_A.*r is 5"),
    "vera rank huge": ("vera-seed", {"r": 1 << 40}, "'r'"),
    "vera seed negative": ("vera-seed", {"projection_prng_key": -1}, "projection_prng_key"),
    "vera seed huge": ("vera-seed", {"projection_prng_key": 1 << 80}, "projection_prng_key"),
    "unilora seed null": ("unilora", {"proj_seed": None}, "proj_seed"),
    "vera projections unsaved": ("vera-seed", {"save_projection": True}, "base_model.vera_A"),
    "vera projections ignored": ("vera", {"save_projection": False}, "save_projection"),
    "vera unknown": ("vera", {"vera_magic": 1}, "vera_magic"),
    "pvera sampling": ("pvera", {"sample_at_inference": True}, "sample_at_inference.*random"),
    "pvera rank": ("pvera", {"r": 8}, "pvera_A"),
    "randlora rank": ("randlora", {"r": 5}, "randlora_A"),
    "randlora unsaved": ("randlora", {"save_projection": False}, "save_projection"),
    "randlora alpha": ("randlora", {"randlora_alpha": ...}, "randlora_alpha"),
    "vblora topk over num_vectors": ("vblora", {"topk": 11}, "topk"),
    "vblora topk zero": ("vblora", {"topk": 0}, "topk"),
    "vblora vectors": ("vblora", {"num_vectors": 11}, "vblora_vector_bank"),
    "vblora length zero": ("vblora", {"vector_length": 0}, "vector_length"),
    "vblora the other form": ("vblora", {"save_only_topk_weights": True}, "vblora_logits_A_topk_indices"),
    "vblora topk of tensors": ("vblora-topk", {"topk": 2}, "topk is 2"),
    "unilora length": ("unilora", {"theta_d_length": 51}, "unilora_theta_d"),
    "unilora length huge": ("unilora", {"theta_d_length": 1 << 40}, "theta_d_length"),
    "unilora nothing targeted": ("unilora", {"target_modules": ["x_proj"]}, "target_modules names no module"),
    "unilora null": ("unilora", {"target_modules": None}, "target_modules names no module"),
    "unilora number": ("unilora", {"target_modules": [1]}, "target_modules"),
    "unilora embedding": ("unilora", {"target_modules": ["embed_tokens"]}, "embedding"),
    "unilora norm": ("unilora", {"target_modules": r".*norm"}, "norm"),
    "unilora bad expression": ("unilora", {"target_modules": "(q_proj"}, "target_modules.*unclosed"),
    "unilora lookahead": ("unilora", {"target_modules": "(?=q).*"}, "target_modules"),
    "unilora long expression": ("unilora", {"target_modules": "a" * 5000}, "4096"),
    "unilora layers": ("unilora", {"layers_to_transform": ["1"]}, "layers_to_transform"),
    "unilora layers bool": ("unilora", {"layers_to_transform": True}, "layers_to_transform"),
    "unilora pattern": ("unilora", {"layers_to_transform": 1, "layers_pattern": "(a+)+"}, "layers_pattern"),
    "unilora saved modules": ("unilora", {"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "unilora not saved": ("unilora-saved", {"save_indices": False}, "unilora_indices"),
    "tinylora tying": ("tinylora", {"weight_tying": 1.5}, "weight_tying"),
    "tinylora groups": ("tinylora", {"weight_tying": 0.5}, "tinylora_v"),
    "tinylora count": ("tinylora", {"u": 4}, "tinylora_v"),
    "tinylora rank": ("tinylora", {"r": 3}, "tinylora_A"),
    "tinylora unsaved": ("tinylora", {"save_projection": False}, "save_projection"),
    "delora rank": ("delora", {"r": 3}, "delora_A"),
    "gralora rank no multiple": ("gralora", {"r": 5}, "multiple of gralora_k"),
    "gralora blocks": ("gralora", {"gralora_k": 4}, "gralora_A"),
    "gralora blocks zero": ("gralora", {"gralora_k": 0}, "gralora_k"),
    "gralora blocks no divisor": ("gralora", {"gralora_k": 3, "r": 3}, "does not divide"),
    "gralora hybrid missing": ("gralora", {"hybrid_r": 2}, "hybrid_r is 2"),
    "gralora hybrid unset": ("gralora", {"hybrid_r": 0}, "gralora_A_general.*no such module"),
    "poly type": ("poly", {"poly_type": "mhr"}, "poly_type"),
    "poly tasks": ("poly", {"n_tasks": 3}, "n_tasks is 3"),
    "poly splits": ("poly", {"n_splits": 3, "n_skills": 2}, "does not divide"),
    "hira rank": ("hira", {"r": 3}, "hira_.*rank 3"),
    "glora kind": ("glora", {"config_A_B": "dense"}, "config_A_B.*lora, vector, constant, none"),
    "glora kind missing": ("glora", {"config_C": ...}, "config_C"),
    "glora kind of tensors": ("glora", {"config_D_E": "constant"}, "glora_D"),
    "glora other kind": ("glora", {"config_A_B": "vector"}, r"glora_A\.X"),
}


@pytest.mark.parametrize("case", FIELDS)
def test_config_fields(case: str, folder: Callable[[str], Path], llama: nn.Module) -> None:
    name, changes, message = FIELDS[case]
    path = folder(name)
    edit_config(path, **changes)
    with pytest.raises(AdapterRejected, match=message):
        compile_for(path, llama)


def _set(key: str, *shape: int) -> Change:
    return lambda t: t.update({key: torch.ones(shape)})


def _fill(key: str, index: Any, value: float) -> Change:
    return lambda t: t[key].__setitem__(index, value)


TENSORS: dict[str, tuple[str, Change, str]] = {
    "loha half": ("loha", lambda t: t.pop(f"{Q0}.hada_w2_b"), "needs a tensor 'hada_w2_b'"),
    "loha shape": ("loha", _set(f"{Q0}.hada_w1_a", 31, 2), r"hada_w1_a.*\(31, 2\)"),
    "loha convolution": ("loha", _set(f"{Q0}.hada_t1", 2, 2, 1, 1), "hada_t1"),
    "lokr product": ("lokr", _set(f"{Q0}.lokr_w1", 4, 5), "Kronecker product must be 32 x 32"),
    "lokr product of nothing": ("lokr", _set(f"{Q0}.lokr_w1", 0, 4), "Kronecker product"),
    "lokr vector": ("lokr", _set(f"{Q0}.lokr_w1", 4), "must be a matrix"),
    "lokr half": ("lokr", lambda t: t.pop(f"{Q0}.lokr_w2_b"), "needs a tensor 'lokr_w2_b'"),
    "lokr both forms": ("lokr", _set(f"{Q0}.lokr_w2", 8, 8), "must be the product of two"),
    "vera half": ("vera", lambda t: t.pop(f"{Q0}.vera_lambda_d"), "vera_lambda_d"),
    "vera lambda": ("vera", _set(f"{Q0}.vera_lambda_b", 31), "out_features"),
    "vera projection": ("vera", _set("base_model.vera_B", 47, 4), r"vera_B.*\(48, 4\)"),
    "vera without sites": ("vera", lambda t: [t.pop(k) for k in list(t) if "lambda" in k], "no meaning"),
    "vera at an embedding": ("vera", _set(f"{EMBED}.vera_lambda_b", 32), "adapts a embedding|adapts an? embedding"),
    "randlora copies differ": ("randlora", _fill(f"{Q0}.randlora_A", 0, 3.0), "differs from 'base_model.randlora_A'"),
    "randlora copy of another shape": ("randlora", _set(f"{Q0}.randlora_B", 1), "differs from"),
    "randlora gamma": ("randlora", _set(f"{Q0}.randlora_gamma", 6, 31), "randlora_gamma"),
    "vblora index": ("vblora-topk", _fill(f"{Q0}.vblora_logits_A_topk_indices", (0, 0, 0), 10), "from 0 to 9"),
    "vblora index twice": ("vblora-topk", _fill(f"{Q0}.vblora_logits_A_topk_indices", (0, 0), 3), "twice"),
    "vblora index type": ("vblora-topk", _set(f"{Q0}.vblora_logits_A_topk_indices", 2, 2, 3), "integers"),
    "vblora weights": ("vblora-topk", _fill(f"{Q0}.vblora_logits_A_topk_weights", (0, 0), 0.6), "sum to over one"),
    "vblora weight": ("vblora-topk", _fill(f"{Q0}.vblora_logits_A_topk_weights", (0, 0), -0.1), "negative"),
    "vblora bank": ("vblora", lambda t: t.pop("base_model.vblora_vector_bank"), "vblora_vector_bank"),
    "unilora theta": ("unilora", lambda t: t.update({"x": t.pop("base_model.unilora_theta_d")}), "unilora_theta_d"),
    "unilora index": ("unilora-saved", _fill(f"{Q0}.unilora_indices_A", (0, 0), 50), "from 0 to 49"),
    "unilora negative index": ("unilora-saved", _fill(f"{Q0}.unilora_indices_A", (0, 0), -1), "from 0 to 49"),
    "unilora scales": ("unilora-saved", lambda t: t.pop(f"{Q0}.unilora_scales_B"), "unilora_scales_B"),
    "tinylora group": ("tinylora", lambda t: t.pop("base_model.tinylora_v.1"), r"tinylora_v\.1"),
    "tinylora group too many": ("tinylora", _set("base_model.tinylora_v.9", 3), r"tinylora_v\.9"),
    "tinylora projection": ("tinylora", lambda t: t.pop(f"{Q0}.tinylora_P"), "tinylora_P"),
    "delora norm": ("delora", lambda t: t.pop(f"{Q0}.delora_w_norm"), "delora_w_norm"),
    "delora lambda": ("delora", _set(f"{Q0}.delora_lambda", 2), "delora_lambda"),
    "gralora general": ("gralora", lambda t: t.pop(f"{Q0}.gralora_B_general.weight"), "gralora_B_general"),
    "poly router": ("poly", lambda t: t.pop(f"{Q0}.poly_router.module_logits"), "module_logits"),
    "hira linear at an embedding": ("hira", _set(f"{EMBED}.hira_A", 2, 64), "hira_A|no meaning"),
    "hira half": ("hira", lambda t: t.pop(f"{EMBED}.hira_embedding_B"), "hira_embedding_B"),
    "hira trained embedding": ("hira", _fill(f"{EMBED}.base_layer.weight", 3, 1.0), "another weight"),
    "glora zeros": ("glora-none", _fill(f"{Q0}.glora_A.zeros", (1, 2), 0.5), "stands for an absent part"),
    "glora half": ("glora", lambda t: t.pop(f"{Q0}.glora_A.Xu"), r"glora_A\.Xu"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors(case: str, folder: Callable[[str], Path], llama: nn.Module) -> None:
    name, change, message = TENSORS[case]
    path = folder(name)
    edit_tensors(path, change)
    with pytest.raises(AdapterRejected, match=message):
        compile_for(path, llama)


@pytest.mark.parametrize("name", ["loha", "vera-seed", "randlora", "unilora", "hira", "glora", "gralora", "tinylora"])
def test_what_small_files_unfold_to_is_bounded(
    name: str, folder: Callable[[str], Path], llama: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder(name)
    monkeypatch.setattr("onebase.adapters.formats.reduce.MAX_EXPANDED", 100)
    with pytest.raises(AdapterTooLarge, match="unfolds to over 100 elements"):
        compile_for(path, llama)


TARGETED: dict[str, tuple[dict[str, Any], int]] = {
    "ends": ({"target_modules": ["q_proj", "mlp.up_proj"]}, 4),
    "whole paths": ({"target_modules": ["model.layers.1.self_attn.q_proj"]}, 1),
    "no parts of names": ({"target_modules": ["_proj", "proj", "q_proj"]}, 2),
    "expression": ({"target_modules": r"model\.layers\.[01]\.(self_attn\.[qk]|mlp\.up)_proj"}, 6),
    "expression matches whole paths": ({"target_modules": "q_proj|.*k_proj"}, 2),
    "layer": ({"target_modules": ["q_proj", "lm_head"], "layers_to_transform": 1}, 2),
    "layers and place": (
        {"target_modules": ["q_proj"], "layers_to_transform": [0, 1, 7], "layers_pattern": "layers"},
        2,
    ),
    "empty layers": ({"target_modules": ["q_proj"], "layers_to_transform": [], "layers_pattern": []}, 2),
}


@pytest.mark.parametrize("case", TARGETED)
def test_targets_are_those_of_peft(case: str, llama: nn.Module) -> None:
    fields, count = TARGETED[case]
    config = peft.UniLoraConfig(r=1, theta_d_length=9, **fields)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(copy.deepcopy(llama), config)
    expected = [path.removeprefix("base_model.model.") for path in adapted.targeted_module_names]
    assert len(expected) == count
    assert [site.path for site in read_targets(Fields(fields), TinyBase(llama))] == expected


def test_a_target_that_the_base_refuses_is_refused(llama: nn.Module) -> None:
    base = TinyBase(llama, refused={"model.layers.1.self_attn.q_proj": "it is seen by half the tokens."})
    with pytest.raises(AdapterRejected, match=r"layers\.1\.self_attn\.q_proj.*half the tokens"):
        read_targets(Fields({"target_modules": ["q_proj"]}), base)

"""The compiled program computes what HF PEFT computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from onebase.adapters.formats import compile_folder

from .conftest import TinyBase, edit_tensors, executed, load_peft, make_model, save_lora

LLAMA_LAYERS = r"model\.layers\.\d+\.(self_attn\.(q|k)_proj|mlp\.down_proj)"

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}),
    "rslora": ("llama", {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": ["k_proj"]}),
    "all_linear": ("llama", {"r": 3, "lora_alpha": 5, "target_modules": "all-linear"}),
    "regex_targets": ("llama", {"r": 2, "target_modules": LLAMA_LAYERS}),
    "one_layer": ("llama", {"r": 2, "target_modules": ["o_proj"], "layers_to_transform": [1]}),
    "patterns": (
        "llama",
        {
            "r": 4,
            "lora_alpha": 6,
            "target_modules": ["q_proj", "v_proj", "up_proj"],
            "rank_pattern": {r"layers\.0\..*_proj": 3, "layers.1.self_attn.q_proj": 7, "^model.layers.1.*up_proj$": 1},
            "alpha_pattern": {"v_proj": 11, r".*\.(?:q|up)_proj": 2.5},
        },
    ),
    "rslora_patterns": (
        "llama",
        {"r": 4, "use_rslora": True, "target_modules": ["q_proj"], "rank_pattern": {"layers.1.self_attn.q_proj": 9}},
    ),
    "lora_bias": ("llama", {"r": 4, "lora_alpha": 12, "lora_bias": True, "target_modules": ["q_proj", "down_proj"]}),
    "head": ("llama", {"r": 4, "target_modules": ["lm_head", "gate_proj"]}),
    "embedding": ("llama", {"r": 4, "lora_alpha": 6, "target_modules": ["embed_tokens", "q_proj"]}),
    "conv1d": ("gpt2", {"r": 4, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "gpt2_embedding": ("gpt2", {"r": 4, "use_rslora": True, "target_modules": ["wte"]}),
    "gemma": ("gemma", {"r": 4, "target_modules": "all-linear"}),
    "gemma_scaled_embedding": ("gemma", {"r": 4, "lora_alpha": 6, "target_modules": ["embed_tokens", "v_proj"]}),
    "orthogonal": ("llama", {"r": 4, "init_lora_weights": "orthogonal", "target_modules": ["q_proj"]}),
}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_program_equals_peft(case: str, tmp_path: Path) -> None:
    name, options = CASES[case]
    model = make_model(name)
    save_lora(model, tmp_path, **options)
    ids = torch.randint(0, 64, (2, 11), generator=torch.Generator().manual_seed(3))
    expected = load_peft(model, tmp_path)(ids).logits

    program = compile_folder(tmp_path, TinyBase(model), "digest")
    with executed(model, program):
        actual = model(ids).logits

    assert (expected - model(ids).logits).abs().max() > 1e-2, "the adapter has to matter"
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    for ops in program.ops.values():
        assert all(tensor.is_contiguous() for tensor in ops.tensors())


@torch.no_grad()
@pytest.mark.parametrize(
    "spell",
    [
        lambda key: key.removeprefix("base_model.model."),
        lambda key: key.replace("base_model.model.", "base_model."),
        lambda key: key.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default."),
        lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
    ],
    ids=["bare", "base_model", "adapter_name", "compiled"],
)
def test_other_spellings_of_keys(spell: Any, adapter: Path, llama: torch.nn.Module) -> None:
    expected = compile_folder(adapter, TinyBase(llama), "d")
    edit_tensors(adapter, lambda t: [t.__setitem__(spell(key), t.pop(key)) for key in list(t)])
    actual = compile_folder(adapter, TinyBase(llama), "d")
    assert set(actual.ops) == set(expected.ops)
    for path, ops in actual.ops.items():
        assert all(torch.equal(x, y) for x, y in zip(ops.tensors(), expected.ops[path].tensors(), strict=True))


def test_dtypes_may_be_mixed(adapter: Path, llama: torch.nn.Module) -> None:
    def mix(tensors: dict[str, torch.Tensor]) -> None:
        for index, key in enumerate(sorted(tensors)):
            tensors[key] = tensors[key].to((torch.float32, torch.bfloat16, torch.float16)[index % 3])

    edit_tensors(adapter, mix)
    program = compile_folder(adapter, TinyBase(llama), "d")
    dtypes = {tensor.dtype for ops in program.ops.values() for tensor in ops.tensors()}
    assert dtypes == {torch.float32, torch.bfloat16, torch.float16}


def test_what_the_program_says_of_itself(adapter: Path, llama: torch.nn.Module) -> None:
    program = compile_folder(adapter, TinyBase(llama), "d")
    assert (program.digest, program.family, program.rank) == ("d", "LORA", 4)
    assert program.num_elements == 2 * (4 * 32 * 2 + 4 * 32 + 4 * 16)

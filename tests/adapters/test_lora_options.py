"""LORA's options and relatives without an engine: what is refused, and what no base here could run with PEFT."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft.utils.other import ModulesToSaveWrapper
from safetensors.torch import save_file
from torch import Tensor, nn

from onebase.adapters.errors import AdapterRejected
from onebase.adapters.formats import compile_folder
from onebase.adapters.program import AdapterProgram

from .conftest import TinyBase, edit_config, edit_tensors, make_model

LAYER = "base_model.model.model.layers.0."
Q, DOWN = LAYER + "self_attn.q_proj", LAYER + "mlp.down_proj"
EMBED, HEAD = "base_model.model.model.embed_tokens", "base_model.model.lm_head"
GENERATOR = torch.Generator().manual_seed(4)


def compile_it(path: Path, model: nn.Module) -> AdapterProgram:
    return compile_folder(path, TinyBase(model), "digest")


def write(path: Path, family: str, tensors: dict[str, Tensor], **config: Any) -> Path:
    path.mkdir(exist_ok=True)
    save_file(tensors, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": family} | config))
    return path


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR)


def factors(module: str, rank: int, width: int, out: int) -> dict[str, Tensor]:
    return {f"{module}.lora_A.weight": draw(rank, width), f"{module}.lora_B.weight": draw(out, rank)}


def change(tensor: str, value: Tensor | None) -> Callable[[dict[str, Tensor]], None]:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors.pop(tensor, None)
        if value is not None:
            tensors[tensor] = value

    return edit


@pytest.fixture(scope="module")
def gpt2() -> nn.Module:
    return make_model("gpt2")


FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "two variants": ({"use_dora": True, "kasa_config": {}}, "'use_dora'.*does not combine it with kasa_config"),
    "variant and shift": ({"use_dora": True, "init_lora_weights": "pissa"}, "init_lora_weights"),
    "mica and dora": ({"use_dora": True, "init_lora_weights": "mica"}, "mica"),
    "dora with a bias": ({"use_dora": True, "lora_bias": True}, "lora_bias"),
    "bias with another start": ({"init_lora_weights": "gaussian", "lora_bias": True}, "lora_bias"),
    "kasa text": ({"kasa_config": "yes"}, "kasa_config.*object or null"),
    "kasa without diagonals": ({"kasa_config": {}}, "lora_diag"),
    "kasa transposed": ({"kasa_config": {}, "fan_in_fan_out": True}, "fan_in_fan_out"),
    "olora transposed": ({"init_lora_weights": "olora", "fan_in_fan_out": True}, "fan_in_fan_out"),
    "pissa of no scale": ({"init_lora_weights": "pissa", "lora_alpha": 0}, "lora_alpha"),
    "velora list": ({"velora_config": []}, "velora_config"),
    "blocks text": ({"use_bdlora": "yes"}, "use_bdlora"),
    "blocks unknown": ({"use_bdlora": {"magic": 1}}, "use_bdlora"),
    "blocks zero": ({"use_bdlora": {"nblocks": 0, "match_strict": False}}, "nblocks"),
    "blocks many": ({"use_bdlora": {"nblocks": 1 << 40}}, "nblocks"),
    "blocks strict": ({"use_bdlora": {"target_modules_bd_a": ["q_proj"]}}, r"v_proj must match exactly one"),
    "blocks both": ({"use_bdlora": {"target_modules_bd_a": ["q_"], "target_modules_bd_b": ["proj"]}}, "exactly one"),
    "blocks that do not divide": (
        {"use_bdlora": {"target_modules_bd_a": ["proj"], "nblocks": 3}},
        "nblocks.*must divide rank 4",
    ),
    "blocks names": ({"use_bdlora": {"target_modules_bd_a": "q_proj"}}, "target_modules_bd_a"),
    "groups that do not divide": ({"use_qalora": True, "qalora_group_size": 5}, "qalora_group_size.*divide the 32"),
    "groups zero": ({"use_qalora": True, "qalora_group_size": 0}, "qalora_group_size"),
    "groups of other shapes": ({"use_qalora": True, "qalora_group_size": 4}, r"\(4, 32\).*\(4, 8\)"),
    "invocation text": ({"alora_invocation_tokens": "go"}, "alora_invocation_tokens"),
    "invocation outside": ({"alora_invocation_tokens": [1, 64]}, "tokens of the base"),
    "invocation long": ({"alora_invocation_tokens": [1] * 2000}, "at most 1024"),
    "invocation and two": ({"alora_invocation_tokens": [1], "use_dora": True}, "does not combine"),
    "arrow": ({"arrow_config": {"top_k": 2}}, "arrow_config"),
    "bias number": ({"bias": 3}, "bias"),
    "saved text": ({"modules_to_save": "lm_head"}, "modules_to_save"),
    "saved number": ({"modules_to_save": [3]}, "modules_to_save"),
    "saved block": ({"modules_to_save": ["mlp"]}, r"modules_to_save names model\.layers\.0\.mlp\.gate_proj"),
    "tokens without rows": ({"trainable_token_indices": [3]}, "no trained rows"),
}


@pytest.mark.parametrize("case", FIELDS)
def test_fields(case: str, adapter: Path, llama: nn.Module) -> None:
    changes, message = FIELDS[case]
    edit_config(adapter, **changes)
    with pytest.raises(AdapterRejected, match=message):
        compile_it(adapter, llama)


TENSORS: dict[str, tuple[dict[str, Any], str, Tensor | None, str]] = {
    "magnitude's shape": ({"use_dora": True}, f"{Q}.lora_magnitude_vector", draw(31), r"\(31,\).*\(32,\)"),
    "diagonal's shape": ({"kasa_config": {}}, f"{Q}.lora_diag", draw(5), r"\(5,\).*\(4,\)"),
    "saved weight's shape": ({}, f"{DOWN}.weight", draw(32, 47), r"\(32, 47\).*\(32, 48\)"),
    "saved weight of an adapted module": ({}, f"{Q}.weight", draw(32, 32), r"would be dropped.*base_layer\.weight"),
    "wrapped bias of a plain module": ({"bias": "all"}, f"{DOWN}.base_layer.bias", draw(32), r"down_proj\.bias"),
    "bias of a module without one": ({"bias": "all"}, f"{HEAD}.bias", draw(64), "has none"),
    "bias's shape": ({"bias": "all"}, f"{DOWN}.bias", draw(33), r"\(33,\)"),
    "norm's shape": ({}, f"{LAYER}input_layernorm.weight", draw(31), r"\(31,\)"),
    "a copy of nothing": ({}, f"{LAYER}router.weight", draw(4, 32), "no such module"),
    "a head without its task": ({}, "base_model.model.score.weight", draw(3, 32), "no such module"),
    "a head's width": ({"task_type": "SEQ_CLS"}, "base_model.model.score.weight", draw(3, 31), r"\(3, 31\)"),
    "a head's dimensions": ({"task_type": "SEQ_CLS"}, "base_model.model.score.weight", draw(32), "1 to 4096 labels"),
    "a head of too many": ({"task_type": "TOKEN_CLS"}, "base_model.model.score.weight", torch.ones(4097, 32), "labels"),
    "a head's bias alone": ({"task_type": "SEQ_CLS"}, "base_model.model.score.bias", draw(3), "weight is missing"),
    "rows without indices": (
        {},
        f"{EMBED}.token_adapter.trainable_tokens_delta",
        draw(1, 32),
        "trainable_token_indices",
    ),
    "rows' shape": (
        {"trainable_token_indices": [3, 4]},
        f"{EMBED}.token_adapter.trainable_tokens_delta",
        draw(3, 32),
        r"\(3, 32\).*\(2, 32\)",
    ),
    "rows of another module": (
        {"trainable_token_indices": {"wte": [3]}},
        f"{EMBED}.token_adapter.trainable_tokens_delta",
        draw(1, 32),
        "exactly one of its names",
    ),
    "rows of a norm": (
        {"trainable_token_indices": [3]},
        f"{LAYER}input_layernorm.token_adapter.trainable_tokens_delta",
        draw(1, 32),
        "no rows of tokens",
    ),
    "tokens twice": (
        {"trainable_token_indices": [3, 3]},
        f"{EMBED}.token_adapter.trainable_tokens_delta",
        draw(2, 32),
        "distinct tokens",
    ),
    "tokens outside": (
        {"trainable_token_indices": [3, 64]},
        f"{EMBED}.token_adapter.trainable_tokens_delta",
        draw(2, 32),
        "distinct tokens",
    ),
    "invocation and a saved module": ({"alora_invocation_tokens": [3]}, f"{DOWN}.weight", draw(32, 48), "whole weight"),
    "invocation and a bias": ({"alora_invocation_tokens": [3]}, f"{Q}.base_layer.bias", draw(32), "whole param"),
    "what only MonteCLoRA reads": ({}, f"{Q}.lora_monteclora_sampler.std_prior", draw(1), "lora_monteclora_sampler"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors(case: str, adapter: Path, llama: nn.Module) -> None:
    config, key, value, message = TENSORS[case]
    if "lora_" in key and config:  # of every adapted module
        modules = [f"{LAYER.replace('0', str(n))}self_attn.{name}" for n in (0, 1) for name in ("q_proj", "v_proj")]
        sizes = {"lora_diag": (4, 4), "lora_magnitude_vector": (32, 16)}[key.rpartition(".")[2]]
        for module in modules:
            size = sizes["v_proj" in module]
            edit_tensors(adapter, change(f"{module}.{key.rpartition('.')[2]}", draw(size)))
    edit_config(adapter, **config)
    edit_tensors(adapter, change(key, value))
    with pytest.raises(AdapterRejected, match=message):
        compile_it(adapter, llama)


def test_a_norm_of_zero_is_refused(adapter: Path, llama: nn.Module) -> None:
    """DoRA divides by the norm of each row of W + BA."""
    weight = llama.get_submodule("model.layers.0.self_attn.q_proj").weight
    tensors = {f"{Q}.lora_A.weight": torch.eye(32), f"{Q}.lora_B.weight": -weight.detach().clone()}
    write(adapter, "LORA", tensors | {f"{Q}.lora_magnitude_vector": torch.ones(32)}, r=32, lora_alpha=32, use_dora=True)
    with pytest.raises(AdapterRejected, match="q_proj: a norm that DoRA divides by is zero"):
        compile_it(adapter, llama)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_more_rank_than_the_weight_has(init: str, adapter: Path, llama: nn.Module) -> None:
    write(adapter, "LORA", factors(Q, 33, 32, 32), r=33, lora_alpha=4, init_lora_weights=init)
    with pytest.raises(AdapterRejected, match="rank 33, which is too much"):
        compile_it(adapter, llama)


def test_qalora_is_plain_lora_over_pooled_inputs(adapter: Path, llama: nn.Module) -> None:
    """PEFT has it for GPTQ's layers only: the formula, computed afresh."""
    tensors = factors(Q, 4, 8, 32)
    write(adapter, "LORA", tensors, r=4, lora_alpha=6, use_qalora=True, qalora_group_size=4)
    op = compile_it(adapter, llama).ops["model.layers.0.self_attn.q_proj"].low_rank
    x = draw(5, 32)
    pooled = x.view(5, 8, 4).mean(2) * 8
    expected = (pooled @ tensors[f"{Q}.lora_A.weight"].T @ tensors[f"{Q}.lora_B.weight"].T) * 6 / 4
    assert op is not None
    torch.testing.assert_close(op.scale * (x @ op.a.T) @ op.b, expected)


def test_activated_lora_has_its_tokens(adapter: Path, llama: nn.Module) -> None:
    plain = compile_it(adapter, llama)
    edit_config(adapter, alora_invocation_tokens=[3, 1, 3])
    program = compile_it(adapter, llama)
    assert program.invocation == (3, 1, 3)
    assert plain.invocation == ()
    assert program.ops.keys() == plain.ops.keys()


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS"])
@pytest.mark.parametrize("name", ["score", "classifier"])
def test_heads_of_classifiers(task: str, name: str, adapter: Path, llama: nn.Module) -> None:
    weight, bias = draw(3, 32), draw(3)
    edit_config(adapter, task_type=task, modules_to_save=["classifier", "score"])
    key = f"base_model.model.{name}"
    edit_tensors(adapter, lambda t: t.update({f"{key}.weight": weight, f"{key}.bias": bias}))
    head = compile_it(adapter, llama).head
    assert head is not None
    assert torch.equal(head.weight, weight)
    assert head.bias is not None
    assert torch.equal(head.bias, bias)
    other = "score" if name == "classifier" else "classifier"
    edit_tensors(adapter, lambda t: t.update({f"base_model.model.{other}.weight": weight}))
    with pytest.raises(AdapterRejected, match="second head"):
        compile_it(adapter, llama)


@pytest.mark.parametrize(
    ("name", "kind", "targets"),
    [
        ("llama", transformers.LlamaForSequenceClassification, ["q_proj"]),
        ("llama", transformers.LlamaForTokenClassification, ["q_proj"]),
        ("gpt2", transformers.GPT2ForSequenceClassification, ["c_attn"]),
        ("gpt2", transformers.GPT2ForTokenClassification, ["c_attn"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_classifiers_as_peft_saves_them(name: str, kind: Any, targets: list[str], tmp_path: Path) -> None:
    base = make_model(name)
    base.config.num_labels = 3
    task = "SEQ_CLS" if "Sequence" in kind.__name__ else "TOKEN_CLS"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(kind(base.config), peft.LoraConfig(r=2, task_type=task, target_modules=targets))
        model.save_pretrained(tmp_path)
    program = compile_it(tmp_path, base)
    wrapper = next(module for module in model.modules() if isinstance(module, ModulesToSaveWrapper))
    saved = wrapper.modules_to_save["default"]
    assert program.head is not None
    assert torch.equal(program.head.weight, saved.weight)
    assert (program.head.bias is None) == (saved.bias is None)
    assert all(path.endswith(targets[0]) for path in program.ops)


def test_tied_rows_that_differ_are_refused(tmp_path: Path, gpt2: nn.Module) -> None:
    """PEFT would take whichever it loads last."""
    keys = [f"base_model.model.{module}.trainable_tokens_delta" for module in ("transformer.wte", "lm_head")]
    rows = draw(2, 32)
    write(tmp_path, "TRAINABLE_TOKENS", {keys[0]: rows, keys[1]: rows.clone()}, token_indices=[9, 4])
    assert compile_it(tmp_path, gpt2).ops.keys() == {"transformer.wte", "lm_head"}
    edit_tensors(tmp_path, change(keys[1], rows + 1))
    with pytest.raises(AdapterRejected, match=r"tied to .*differ"):
        compile_it(tmp_path, gpt2)


def test_factors_and_rows_at_one_embedding(tmp_path: Path, llama: nn.Module) -> None:
    tensors = {
        f"{EMBED}.lora_embedding_A": draw(2, 64),
        f"{EMBED}.lora_embedding_B": draw(32, 2),
        f"{EMBED}.token_adapter.trainable_tokens_delta": draw(1, 32),
    }
    write(tmp_path, "LORA", tensors, r=2, lora_alpha=2, trainable_token_indices=[5])
    with pytest.raises(AdapterRejected, match="both factors and trained rows"):
        compile_it(tmp_path, llama)


def test_another_weight_below_dora(adapter: Path, llama: nn.Module) -> None:
    """Its norms were of the base's weight."""
    tensors = factors(HEAD, 2, 32, 64) | {f"{HEAD}.base_layer.weight": draw(64, 32)}
    write(adapter, "LORA", tensors, r=2, lora_alpha=2)
    assert compile_it(adapter, llama).ops["lm_head"].extra
    write(adapter, "LORA", tensors | {f"{HEAD}.lora_magnitude_vector": draw(64)}, r=2, lora_alpha=2, use_dora=True)
    with pytest.raises(AdapterRejected, match="holds another weight"):
        compile_it(adapter, llama)


RELATIVES: dict[str, tuple[str, dict[str, Tensor], dict[str, Any], str]] = {
    "adalora rank": ("ADALORA", {"lora_A": draw(3, 32)}, {}, r"\(3, 32\).*\(4, 32\)"),
    "adalora pattern text": ("ADALORA", {}, {"rank_pattern": "x"}, "rank_pattern"),
    "adalora pattern short": (
        "ADALORA",
        {},
        {"rank_pattern": {"model.layers.0.mlp.up_proj.lora_E": [True]}},
        "4 flags",
    ),
    "adalora pattern of nothing": ("ADALORA", {}, {"rank_pattern": {"x.lora_E": [True] * 4}}, "no such module"),
    "adalora half": ("ADALORA", {"lora_E": torch.empty(0)}, {}, "'lora_E'"),
    "adalora huge": ("ADALORA", {}, {"init_r": 1 << 40}, "init_r"),
    "adalora dora": ("ADALORA", {}, {"use_dora": True}, "use_dora"),
    "adalora pruned": (
        "ADALORA",
        {},
        {"rank_pattern": {"model.layers.0.self_attn.q_proj.lora_E": [True, False, True, True]}},
        r"\(4, 32\).*\(3, 32\)",
    ),
}


@pytest.mark.parametrize("case", RELATIVES)
def test_adalora(case: str, tmp_path: Path, llama: nn.Module) -> None:
    family, changes, config, message = RELATIVES[case]
    tensors = {"lora_A": draw(4, 32), "lora_B": draw(32, 4), "lora_E": draw(4, 1)} | changes
    sound = {f"{Q}.{name}": value for name, value in tensors.items() if value.numel()}
    write(tmp_path, family, sound, **({"init_r": 4, "lora_alpha": 8, "r": 8} | config))
    with pytest.raises(AdapterRejected, match=message):
        compile_it(tmp_path, llama)


def test_adalora_may_have_no_direction_left(tmp_path: Path, llama: nn.Module) -> None:
    pattern = {"model.layers.0.self_attn.q_proj.lora_E": [False] * 4}
    tensors = {f"{Q}.lora_A": torch.ones(0, 32), f"{Q}.lora_B": torch.ones(32, 0), f"{Q}.lora_E": torch.ones(0, 1)}
    down = {f"{DOWN}.lora_A": draw(4, 48), f"{DOWN}.lora_B": draw(32, 4), f"{DOWN}.lora_E": draw(4, 1)}
    write(tmp_path, "ADALORA", tensors | down, init_r=4, lora_alpha=0, rank_pattern=pattern)
    ops = compile_it(tmp_path, llama).ops
    assert ops.keys() == {"model.layers.0.mlp.down_proj"}
    assert ops["model.layers.0.mlp.down_proj"].low_rank is not None
    assert ops["model.layers.0.mlp.down_proj"].low_rank.scale == pytest.approx(4 / 4.00001, abs=1e-12)


def test_ln_tuning_and_beft(tmp_path: Path, llama: nn.Module) -> None:
    norm = f"{LAYER}input_layernorm.ln_tuning_layers"
    write(tmp_path, "LN_TUNING", {f"{norm}.bias": draw(32)})
    with pytest.raises(AdapterRejected, match="input_layernorm of the base has none"):
        compile_it(tmp_path, llama)
    write(tmp_path, "LN_TUNING", {f"{norm}.weight": draw(31)})
    with pytest.raises(AdapterRejected, match=r"\(31,\)"):
        compile_it(tmp_path, llama)
    write(tmp_path, "BEFT", {f"{Q}.beft_bias": draw(1, 31)})
    with pytest.raises(AdapterRejected, match=r"\(1, 31\).*\(1, 32\)"):
        compile_it(tmp_path, llama)
    write(tmp_path, "BEFT", {f"{EMBED}.beft_bias": draw(1, 32)})
    with pytest.raises(AdapterRejected, match="BEFT adapts linear modules"):
        compile_it(tmp_path, llama)


def test_conv1d_is_saved_transposed(tmp_path: Path, gpt2: nn.Module) -> None:
    """Square ones too, where the shape does not tell."""
    module = gpt2.get_submodule("transformer.h.0.attn.c_proj")
    copy = module.weight.detach() + draw(32, 32)
    key = "base_model.model.transformer.h.0.attn.c_proj"
    tensors = {f"{key}.weight": copy, f"{key}.bias": module.bias.detach().clone()}
    write(tmp_path, "LN_TUNING", tensors, modules_to_save=["c_proj"])
    with pytest.raises(AdapterRejected, match=r"modules_to_save names transformer\.h\.0\.mlp\.c_proj"):
        compile_it(tmp_path, gpt2)
    edit_config(tmp_path, modules_to_save=["0.attn.c_proj"])
    (dense,) = compile_it(tmp_path, gpt2).ops["transformer.h.0.attn.c_proj"].extra
    torch.testing.assert_close(dense.weight, (copy - module.weight).T)  # type: ignore[attr-defined]

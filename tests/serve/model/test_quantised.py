"""Bases in few bits: served as they compute, with adapters on top, and their weights given to who needs them.

The module made here stands for every library; with bitsandbytes and torchao installed (the extra ``quantised``) theirs
are compared with PEFT over the same model.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from onebase.adapters.errors import ModelRejected
from onebase.serve.check_adapter import check_adapter
from onebase.serve.engine.config import EngineConfig
from onebase.serve.engine.engine import Engine
from onebase.serve.engine.usage import weight_bytes
from onebase.serve.model.loader import LoadedModel, fingerprint, load_model, prepare
from onebase.serve.model.quantised import dense_weight, is_quantised

from ...conftest import EngineDriver

Make = Callable[[str], Path]
PROMPT = [5, 6, 7, 8, 9, 20, 21, 22]
OPTIONS: dict[str, Any] = {
    "device": "cpu",
    "page_size": 8,
    "kv_memory": 0.01,
    "adapter_memory": 0.05,
    "host_cache": 0.0,
}


class Int8Linear(nn.Module):
    """A row of whole numbers and a scale for each output; neither a Linear nor a weight in floating point."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = plain.in_features, plain.out_features
        scale = plain.weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("qweight", (plain.weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", plain.bias)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight_in(x.dtype), self.bias)

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        return (self.qweight * self.scale).to(dtype)


def _plain(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().requires_grad_(False)


def _in_few_bits(folder: Path) -> Any:
    model = _plain(folder)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and child is not model.lm_head:
                setattr(module, name, Int8Linear(child))
    return model


def _dequantised(folder: Path) -> Any:
    """The plain model that computes the same."""
    model = _plain(folder)
    for path, module in _in_few_bits(folder).named_modules():
        if isinstance(module, Int8Linear):
            model.get_submodule(path).weight.copy_(module.weight_in(torch.float32))
    return model


@pytest.fixture
def folder(checkpoint: Make) -> Path:
    return checkpoint("llama")


def _driver(base: LoadedModel, config: EngineConfig) -> EngineDriver:
    return EngineDriver(Engine(config, base), [entry.site for entry in base.probed])


def _adapter(base: Any, into: Path, **options: Any) -> tuple[Path, Tensor]:
    """A LoRA of PEFT over a model: its folder, and its log-probabilities [tokens, vocabulary]."""
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False, **options)
    model = get_peft_model(base, config).eval()
    model.save_pretrained(into)
    return into, _logprobs(model)


@torch.no_grad()
def _logprobs(model: Any) -> Tensor:
    return torch.log_softmax(model(torch.tensor([PROMPT])).logits[0].float(), -1)


def _served(driver: EngineDriver, *folders: Path | None) -> list[Tensor]:
    """All in one batch, in two chunks."""
    jobs = [(PROMPT, () if one is None else (driver.use(one),)) for one in folders]
    found = driver.logprobs(jobs, 1)
    return [torch.stack([rows[position] for position in range(len(PROMPT))]) for rows in found]


def test_it_is_served_as_it_computes_with_adapters_that_need_the_weight(folder: Path, tmp_path: Path) -> None:
    """LoRA and DoRA beside the base; PEFT's are over the plain model with the same weights."""
    config = EngineConfig(str(folder), **OPTIONS)
    driver = _driver(prepare(_in_few_bits(folder), config), config)
    lora, with_lora = _adapter(_dequantised(folder), tmp_path / "lora")
    dora, with_dora = _adapter(_dequantised(folder), tmp_path / "dora", use_dora=True)
    got = _served(driver, None, lora, dora)
    for one, want in zip(got, (_logprobs(_dequantised(folder)), with_lora, with_dora), strict=True):
        torch.testing.assert_close(one, want, rtol=0, atol=1e-4)
    assert float((got[0] - _logprobs(_plain(folder))).abs().max()) > 1e-3, "the weights are those in few bits"


def test_weights_are_those_that_are_multiplied_by(folder: Path) -> None:
    """Past the adapters' forward and the bias; sites are those of the plain model."""
    config = EngineConfig(str(folder), **OPTIONS)
    few, plain = prepare(_in_few_bits(folder), config), prepare(_plain(folder), config)
    assert dict(few.sites) == dict(plain.sites)
    modules = {path: few.model.get_submodule(path) for path in few.sites}
    want = {path: m.weight_in(torch.float32).clone() for path, m in modules.items() if isinstance(m, Int8Linear)}
    driver = _driver(few, config)
    driver.generate(PROMPT, max_tokens=2)
    for path, weight in want.items():
        torch.testing.assert_close(few.weight(path), weight, rtol=0, atol=1e-6)
        assert few.weight(path).is_contiguous()
        assert few.bias(path) is not None
    assert weight_bytes(few) < 0.6 * weight_bytes(plain)


def test_offline_checks_work_on_it(folder: Path, tmp_path: Path) -> None:
    config = EngineConfig(str(folder), **OPTIONS)
    adapter, _ = _adapter(_dequantised(folder), tmp_path / "dora", use_dora=True)
    report = check_adapter(adapter, prepare(_in_few_bits(folder), config))
    assert report.family == "LORA"
    assert report.rank_max == 4


def test_fingerprints_cover_every_bit(folder: Path) -> None:
    """A single entry that no sample hits; few bits and their scales too; and the same under every type."""
    plain, few = fingerprint(_plain(folder)), fingerprint(_in_few_bits(folder))
    assert plain == fingerprint(_plain(folder))
    assert few == fingerprint(_in_few_bits(folder)) != plain
    changed = _plain(folder)
    changed.model.layers[1].mlp.up_proj.weight[11, 13] += 0.25
    assert fingerprint(changed) != plain
    changed = _in_few_bits(folder)
    changed.model.layers[1].mlp.up_proj.qweight[11, 13] += 1
    assert fingerprint(changed) != few
    changed = _in_few_bits(folder)
    changed.model.layers[0].mlp.up_proj.scale[7] *= 2
    assert fingerprint(changed) != few


def test_the_fingerprint_is_the_same_under_every_type(folder: Path, tmp_path: Path) -> None:
    _plain(folder, torch.bfloat16).save_pretrained(tmp_path)
    assert fingerprint(_plain(tmp_path, torch.float32)) == fingerprint(_plain(tmp_path, torch.bfloat16))


def test_plain_modules_are_not_quantised(folder: Path) -> None:
    assert not any(is_quantised(module) for module in _plain(folder, torch.bfloat16).modules())
    assert not is_quantised(nn.Embedding(4, 4))


def test_a_library_that_is_not_there_is_named(folder: Path, tmp_path: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(folder)
    config.quantization_config = {"quant_method": "vptq"}
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelRejected, match=r"is quantised \(vptq\), and cannot be loaded on cpu: .*vptq"):
        load_model(EngineConfig(str(tmp_path), **OPTIONS))


def _regular(folder: Path) -> Path:
    """A tiny Llama whose widths are multiples of 64, as the libraries' kernels want them."""
    torch.manual_seed(2)
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**sizes, **heads))
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def _library_config(kind: str) -> Any:
    if kind == "int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return transformers.TorchAoConfig(Int8WeightOnlyConfig())
    if kind == "float8":
        from torchao.quantization import Float8WeightOnlyConfig

        return transformers.TorchAoConfig(Float8WeightOnlyConfig())
    options: dict[str, Any] = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
    return transformers.BitsAndBytesConfig(
        **({"load_in_8bit": True} if kind == "bnb8" else {"load_in_4bit": True, **options})
    )


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("library", "kind"),
    [("bitsandbytes", "bnb4"), ("bitsandbytes", "bnb8"), ("torchao", "int8"), ("torchao", "float8")],
)
def test_libraries_are_served_as_peft_has_them(library: str, kind: str, tmp_path: Path) -> None:
    """In bfloat16, whose rounding is what they differ by. bitsandbytes repacks 4-bit weights in the first forward on a
    CPU, after which PEFT's DoRA reads them wrongly: there it is compared over the plain weights."""
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    folder = _regular(tmp_path / "plain")
    quantised, dtype = {"device_map": {"": "cpu"}, "dtype": torch.bfloat16}, torch.bfloat16
    load = transformers.AutoModelForCausalLM.from_pretrained
    load(folder, quantization_config=_library_config(kind), **quantised).save_pretrained(tmp_path / "base")
    config = EngineConfig(str(tmp_path / "base"), dtype="bfloat16", **OPTIONS)
    base = load_model(config)
    plain = _plain(folder, dtype)
    for path, module in base.model.named_modules():
        if is_quantised(module):
            plain.get_submodule(path).weight.copy_(dense_weight(module, dtype))
    lora, with_lora = _adapter(load(tmp_path / "base", **quantised), tmp_path / "lora")
    dora, with_dora = _adapter(
        plain if kind == "bnb4" else load(tmp_path / "base", **quantised), tmp_path / "dora", use_dora=True
    )
    want = [_logprobs(load(tmp_path / "base", **quantised)), with_lora, with_dora]
    for one, expected in zip(_served(_driver(base, config), None, lora, dora), want, strict=True):
        assert float((one - expected).abs().max()) < 0.4
        assert float((one - expected).abs().mean()) < 0.06

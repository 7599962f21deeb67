"""Residual sums with their norms: which layers have them, and that nothing but the number of passes changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from onebase.kernels.native.library import available
from onebase.serve.engine.config import EngineConfig
from onebase.serve.model import fused
from onebase.serve.model.loader import LoadedModel, prepare
from onebase.serve.model.norms import FusedNorm, Norm, fuse_norms
from onebase.serve.model.probe import probe_forward
from onebase.serve.model.sums import PreNormLayer, SumNorm, Sums

pytestmark = pytest.mark.skipif(not available(), reason="there is no C compiler")
PRE_NORM = ["llama", "llama_mha", "qwen2", "qwen3", "mistral", "phi3", "mixtral", "qwen3_moe", "gpt_oss"]
SMALL = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3, "vocab_size": 96, "head_dim": 8}
OTHERS = ["gemma2", "gemma3", "gpt2", "opt", "gpt_neox", "olmo2"]


def _prepared(folder: Path, dtype: torch.dtype) -> LoadedModel:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().requires_grad_(False)
    return prepare(model, EngineConfig(str(folder), device="cpu", max_model_len=32))


def _of_kind(base: LoadedModel, kind: type[Any]) -> list[Any]:
    forwards = (vars(module).get("forward") for module in base.model.modules())
    return [forward for forward in forwards if isinstance(forward, kind)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PRE_NORM)
def test_every_sum_of_a_pre_norm_model_comes_with_its_norm(
    name: str, dtype: torch.dtype, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = _prepared(checkpoint(name), dtype)
    layers = _of_kind(base, PreNormLayer)
    assert len(layers) == len(base.layers)
    assert None not in [layer.next_norm for layer in layers]
    assert len(_of_kind(base, SumNorm)) == 2 * len(layers)
    monkeypatch.setattr(fused, "_fuse_sums", lambda *_: None)
    plain = _prepared(checkpoint(name), dtype)
    assert not _of_kind(plain, PreNormLayer)
    with torch.inference_mode():
        got, expected = (probe_forward(one.model, one.context) for one in (base, plain))
    assert torch.equal(got, expected)


@pytest.mark.parametrize("name", OTHERS)
def test_layers_of_another_kind_keep_their_own_forward(name: str, checkpoint: Callable[..., Path]) -> None:
    base = _prepared(checkpoint(name), torch.float32)
    assert not _of_kind(base, PreNormLayer)
    assert not _of_kind(base, SumNorm)


def test_a_layer_that_weighs_its_residual_keeps_its_own(checkpoint: Callable[..., Path]) -> None:
    """Granite: a Llama but for a factor on what its blocks give."""
    config = transformers.GraniteConfig.from_pretrained(checkpoint("llama"), residual_multiplier=0.5)
    assert not _of_kind(_served(_random(config)), PreNormLayer)


def _random(config: transformers.PreTrainedConfig) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def _served(model: transformers.PreTrainedModel) -> LoadedModel:
    return prepare(model, EngineConfig("random", device="cpu", max_model_len=32))


def test_experts_that_drop_the_batchs_dimension_are_added_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama 4's."""
    config = transformers.Llama4TextConfig(
        **SMALL, intermediate_size=48, intermediate_size_mlp=48, num_local_experts=2, num_key_value_heads=2,
        attn_temperature_tuning=False, attention_chunk_size=64,
    )  # fmt: skip
    base = _served(_random(config))
    assert len(_of_kind(base, PreNormLayer)) == 3
    monkeypatch.setattr(fused, "_fuse_sums", lambda *_: None)
    plain = _served(_random(config))
    with torch.inference_mode():
        got, expected = (probe_forward(one.model, one.context) for one in (base, plain))
    assert torch.equal(got, expected)


class _Bounded(nn.Module):
    """A layer that bounds its output, which the probe's small values do not reach."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.__dict__["_own"] = layer.forward
        layer.forward = self.forward  # type: ignore[assignment]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = self._own(*args, **kwargs)
        return y.clamp(-1, 1)


def _nudge(module: nn.Module, args: tuple[Tensor, ...]) -> None:
    args[0].add_(0.3)


@pytest.mark.parametrize("change", ["bounded", "nudged"])
def test_a_model_that_does_more_between_its_sums_keeps_its_own(change: str) -> None:
    """A layer bounds what it gives; or the sum that it reads is changed in place before."""
    model = _random(transformers.LlamaConfig(**SMALL, intermediate_size=48))
    for layer in model.model.layers:
        if change == "bounded":
            _Bounded(layer)
        else:
            layer.register_forward_pre_hook(_nudge)
    with torch.inference_mode():
        expected = model(torch.arange(24)[None] * 7 % 96).logits[0, -3:]
    base = _served(model)
    layers = _of_kind(base, PreNormLayer)
    known = [layer.next_norm is not None for layer in layers]
    assert known == ([] if change == "bounded" else [False, False, True]), "the last norm reads what it is"
    with torch.inference_mode():
        torch.testing.assert_close(probe_forward(base.model, base.context), expected, rtol=1e-4, atol=1e-5)


def test_a_layer_that_cannot_be_called_so_keeps_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(self: PreNormLayer, hidden_states: Tensor, **kwargs: Any) -> None:
        raise KeyError("position_ids")

    monkeypatch.setattr(PreNormLayer, "__call__", raises)
    assert not _of_kind(_served(_random(transformers.LlamaConfig(**SMALL, intermediate_size=48))), PreNormLayer)


def test_a_model_that_gives_other_numbers_as_a_whole_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sums, "take", lambda self, norm, x: torch.zeros_like(x))
    base = _served(_random(transformers.LlamaConfig(**SMALL, intermediate_size=48)))
    assert not _of_kind(base, PreNormLayer)
    assert not _of_kind(base, SumNorm)
    assert len(_of_kind(base, FusedNorm)) == 7


def _norm(seed: int = 0) -> Norm:
    torch.manual_seed(seed)
    module = transformers.models.llama.modeling_llama.LlamaRMSNorm(32).requires_grad_(False)
    module.weight.normal_()
    assert fuse_norms([module]) == [module]
    norm: Norm = module.forward
    return norm


def test_what_is_there_is_given_once_and_to_its_norm_alone() -> None:
    sums, mine, other = Sums(), _norm(0), _norm(1)
    x, residual = torch.randn(2, 1, 5, 32)
    total = sums.add(mine, x, residual)
    assert torch.equal(total, x + residual)
    assert sums.take(other, total) is None
    assert sums.take(mine, total.clone()) is None
    taken = sums.take(mine, total)
    assert taken is not None
    assert torch.equal(taken, mine(total))
    assert sums.take(mine, total) is None


def test_a_sum_that_is_forgotten_is_read_again() -> None:
    sums, norm = Sums(), _norm()
    forward = SumNorm(norm, sums)
    total = sums.add(norm, *torch.randn(2, 1, 5, 32))
    total[0, 2] += 1
    sums.forget()
    assert torch.equal(forward(total), norm(total))


def test_what_is_not_alike_is_not_added() -> None:
    with pytest.raises(ValueError, match="a sum of"):
        Sums().add(_norm(), torch.zeros(1, 5, 32), torch.zeros(5, 32))

"""Triton bodies of norms, rotary positions and gated feed-forwards against the modules' own; whole models on them."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2 import modeling_olmo2
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

from onebase.serve.engine.config import EngineConfig
from onebase.serve.model import norms
from onebase.serve.model.gated import GatedForward, fuse_gated
from onebase.serve.model.loader import prepare
from onebase.serve.model.packed import join_linears
from onebase.serve.model.rotary import fuse_rotary
from onebase.serve.model.trial import same_numbers

triton = pytest.importorskip("triton")
interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="set TRITON_INTERPRET=1 before the run (make test does)"
)
DTYPES = [torch.float32, torch.float16]  # the interpreter cuts bfloat16 off where a device rounds
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
QUICK = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))


def check_norms(kind: type[nn.Module], width: int, rows: int, dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(0)
    module = kind(width).to(device, dtype).requires_grad_(False)
    module.weight.normal_(1.0, 0.3)
    plain = copy.deepcopy(module)
    assert norms.fuse_norms([module]) == [module]
    assert type(module.forward).__name__ == "LaunchedNorm"
    for x in (
        torch.randn(1, rows, width, device=device, dtype=dtype),
        torch.randn(1, rows, 3 * width, device=device, dtype=dtype)[..., width : 2 * width],
        torch.randn(1, rows, 2, width, device=device, dtype=dtype),
        torch.randn(1, 2, rows, width, device=device, dtype=dtype).transpose(1, 2),
    ):
        got = module(3 * x)
        assert same_numbers(got, plain(3 * x))
        assert got.is_contiguous()
        total, normed = module.forward.of_sum(x, got)
        assert torch.equal(total, x + got)
        assert same_numbers(normed, plain(total))
        assert total.is_contiguous()


@interpreted
@pytest.mark.usefixtures("on_triton")
@QUICK
@given(
    st.sampled_from([LlamaRMSNorm, Gemma2RMSNorm, GptOssRMSNorm]), st.sampled_from([8, 64, 100, 576, 3000]),
    st.sampled_from([1, 5, 33]), st.sampled_from(DTYPES),
)  # fmt: skip
def test_norms(kind: type[nn.Module], width: int, rows: int, dtype: torch.dtype) -> None:
    check_norms(kind, width, rows, dtype, CPU)


def attention(heads: int, kv_heads: int, dim: int, dtype: torch.dtype, device: torch.device) -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=4 * heads, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=dim
    )
    return modeling_llama.LlamaAttention(config, 0).to(device, dtype).requires_grad_(False)


def check_rotary(heads: int, kv_heads: int, dim: int, tokens: int, dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(0)
    module = attention(heads, kv_heads, dim, dtype, device)
    assert fuse_rotary(module, heads, kv_heads, dim)
    ours = module.forward.__func__.__globals__["apply_rotary_pos_emb"]
    joint = torch.randn(1, tokens, heads + 2 * kv_heads, dim, device=device, dtype=dtype).transpose(1, 2)
    q, k = joint[:, :heads], joint[:, heads : heads + kv_heads]
    cos, sin = (torch.randn(1, tokens, dim, device=device, dtype=dtype) for _ in range(2))
    for got, expected in zip(ours(q, k, cos, sin), modeling_llama.apply_rotary_pos_emb(q, k, cos, sin), strict=True):
        assert same_numbers(got, expected)
        assert got.stride() == torch.empty(1, tokens, got.shape[1], dim).transpose(1, 2).stride()
    half = [part[..., : dim // 2] for part in (cos, sin)]
    with pytest.raises(RuntimeError):  # another rotation than whole heads is the module's own affair
        ours(q, k, *half)


@interpreted
@QUICK
@given(
    st.sampled_from([(4, 4), (9, 3), (8, 1)]), st.sampled_from([8, 64, 80]), st.sampled_from([1, 7]),
    st.sampled_from(DTYPES),
)  # fmt: skip
def test_rotary(heads: tuple[int, int], dim: int, tokens: int, dtype: torch.dtype) -> None:
    check_rotary(*heads, dim, tokens, dtype, CPU)


@interpreted
def test_no_other_model_of_the_process_is_touched() -> None:
    module, other = (attention(4, 2, 8, torch.float32, CPU) for _ in range(2))
    own = modeling_llama.apply_rotary_pos_emb
    assert fuse_rotary(module, 4, 2, 8)
    assert modeling_llama.apply_rotary_pos_emb is own
    assert "forward" not in vars(other)
    assert other.forward.__func__.__globals__["apply_rotary_pos_emb"] is own


@interpreted
@pytest.mark.parametrize("name", ["rotary_pos_emb of another signature", "none"])
def test_another_rotation_keeps_its_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = attention(4, 2, 8, torch.float32, CPU)
    if name == "none":
        assert not fuse_rotary(nn.Linear(4, 4), 4, 2, 8)
        return

    def interleaved(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        return q.flip(-1) * cos[:, None], k.flip(-1) * sin[:, None]

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", interleaved)
    assert not fuse_rotary(module, 4, 2, 8)
    assert "forward" not in vars(module)


@interpreted
def test_tables_in_single_precision_are_the_modules_own_affair() -> None:
    """OLMo's rotary tables stay float32, and its function rounds once, at the end."""
    torch.manual_seed(0)
    config = transformers.Olmo2Config(hidden_size=32, num_attention_heads=4, num_key_value_heads=2)
    module = modeling_olmo2.Olmo2Attention(config, 0).half().requires_grad_(False)
    fuse_rotary(module, 4, 2, 8)
    cos, sin = modeling_olmo2.Olmo2RotaryEmbedding(config)(torch.zeros(1, 7, 32).half(), torch.arange(7)[None] + 100)
    assert cos.dtype is torch.float32
    q, k = (torch.randn(1, 7, heads, 8).half().transpose(1, 2) for heads in (4, 2))
    ours = module.forward.__func__.__globals__["apply_rotary_pos_emb"]
    for got, expected in zip(ours(q, k, cos, sin), modeling_olmo2.apply_rotary_pos_emb(q, k, cos, sin), strict=True):
        assert torch.equal(got, expected)


def check_gated(activation: str, width: int, rows: int, dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(0)
    config = transformers.Qwen3Config(hidden_size=48, intermediate_size=width, hidden_act=activation)
    module = Qwen3MLP(config).to(device, dtype).requires_grad_(False)
    plain = copy.deepcopy(module)
    assert fuse_gated([module, nn.Linear(2, 2)]) == [module]
    assert isinstance(module.forward, GatedForward)
    gate, up = (torch.randn(1, rows, 2 * width, device=device, dtype=dtype)[..., at::2][..., :width] for at in (0, 1))
    parts = torch.randn(1, rows, 2 * width, device=device, dtype=dtype).split(width, dim=-1)
    assert same_numbers(module.forward.product(*parts), ACT2FN[activation](parts[0]) * parts[1])
    assert same_numbers(module.forward.product(gate.contiguous(), up.contiguous()), ACT2FN[activation](gate) * up)
    x = torch.randn(1, rows, 48, device=device, dtype=dtype)
    torch.testing.assert_close(module(x), plain(x))


@interpreted
@QUICK
@given(
    st.sampled_from(["silu", "gelu", "gelu_pytorch_tanh"]), st.sampled_from([33, 64, 1500]), st.sampled_from([1, 9]),
    st.sampled_from(DTYPES),
)  # fmt: skip
def test_gated(activation: str, width: int, rows: int, dtype: torch.dtype) -> None:
    dtype = dtype if activation == "silu" else torch.float32  # a CPU's own gelu is coarser in half precision
    check_gated(activation, width, rows, dtype, CPU)


class _Halved(Qwen3MLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * super().forward(x)


@interpreted
@pytest.mark.parametrize(("kind", "activation"), [(Qwen3MLP, "relu"), (_Halved, "silu")])
def test_a_feed_forward_that_is_another_keeps_its_own(kind: type[nn.Module], activation: str) -> None:
    config = transformers.Qwen3Config(hidden_size=16, intermediate_size=24, hidden_act=activation)
    assert fuse_gated([kind(config).requires_grad_(False)]) == []


@pytest.mark.parametrize("biases", [(True, False, True), (False, False, False)])
def test_weights_of_one_product_are_views_of_it(biases: tuple[bool, ...]) -> None:
    plain = [nn.Linear(48, width, bias).requires_grad_(False) for width, bias in zip((96, 32, 40), biases, strict=True)]
    joined = copy.deepcopy(plain)
    alone = copy.deepcopy(plain[0])
    assert join_linears([joined, [alone]]) == joined
    assert len({module.weight.untyped_storage().data_ptr() for module in joined}) == 1
    for rows in (1, 5):
        x = torch.randn(1, rows, 48)
        for one, other in zip(plain, joined, strict=True):
            assert torch.equal(one.weight, other.weight)
            torch.testing.assert_close(other(x), one(x))


@interpreted
@pytest.mark.usefixtures("on_triton")
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "phi3", "gpt_neox", "gpt_oss"])
def test_whole_models(name: str, checkpoint: Callable[..., Path], make_driver: Callable[..., Any]) -> None:
    """Log-probabilities of prompts side by side, in one go and token by token, as transformers gives them."""
    torch.manual_seed(0)
    prompts = [torch.randint(0, 128, (length,)).tolist() for length in (9, 1, 5)]
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint(name), attn_implementation="eager").eval()
    with torch.inference_mode():
        expected = [torch.log_softmax(model(torch.tensor([prompt])).logits[0].float(), -1) for prompt in prompts]
    driver = make_driver(name)
    for chunk in (64, 1):
        for found, reference in zip(
            driver.logprobs([(prompt, ()) for prompt in prompts], chunk), expected, strict=True
        ):
            for position, logprobs in found.items():
                torch.testing.assert_close(logprobs, reference[position], rtol=0, atol=1e-4)


@interpreted
@pytest.mark.usefixtures("on_triton")
def test_shared_weights_stay_known_as_such(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)
    first, second = (layer.mlp for layer in model.model.layers[:2])
    second.up_proj.weight = first.up_proj.weight
    base = prepare(model, EngineConfig(str(folder), dtype="float32", device="cpu"))
    assert base.tied("model.layers.0.mlp.up_proj") == ("model.layers.1.mlp.up_proj",)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_all_of_them_on_cuda(dtype: torch.dtype) -> None:
    for kind in (LlamaRMSNorm, Gemma2RMSNorm, GptOssRMSNorm):
        for width, rows in ((64, 300), (128, 33), (4096, 7), (5120, 1), (16384, 3)):
            check_norms(kind, width, rows, dtype, CUDA)
    for heads, dim in (((32, 8), 128), ((9, 3), 64), ((8, 1), 80), ((16, 16), 256)):
        check_rotary(*heads, dim, 65, dtype, CUDA)
    for activation in ("silu", "gelu", "gelu_pytorch_tanh"):
        check_gated(activation, 14336, 65, dtype, CUDA)

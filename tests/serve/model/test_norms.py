"""Fused norms give what the modules' own forwards give; what is no such norm keeps its own."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from onebase.kernels.native.library import available
from onebase.serve.model.norms import fuse_norms

pytestmark = pytest.mark.skipif(not available(), reason="there is no C compiler")
KINDS = [LlamaRMSNorm, Gemma2RMSNorm, Olmo2RMSNorm, GptOssRMSNorm]


def made(kind: type[nn.Module], width: int, dtype: torch.dtype) -> nn.Module:
    """With a weight drawn at random."""
    torch.manual_seed(0)
    module = kind(width).to(dtype).requires_grad_(False)
    module.weight.normal_(1.0, 0.3)
    return module


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [64, 100])
def test_every_known_formula_is_found(kind: type[nn.Module], dtype: torch.dtype, width: int) -> None:
    plain, fused = made(kind, width, dtype), made(kind, width, dtype)
    assert fuse_norms([fused]) == [fused]
    assert type(fused.forward).__name__ == "FusedNorm"
    for shape in ((1, 1, width), (1, 700, width), (1, 3, 2, width)):  # the last one: heads, as in Qwen3
        x = torch.randn(shape, dtype=dtype) * 3
        torch.testing.assert_close(fused(x), plain(x))
    sliced = torch.randn(1, 5, 3 * width, dtype=dtype)[..., width : 2 * width]
    torch.testing.assert_close(fused(sliced), plain(sliced))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sum_and_its_norm(kind: type[nn.Module], dtype: torch.dtype) -> None:
    plain, fused = made(kind, 100, dtype), made(kind, 100, dtype)
    fuse_norms([fused])
    wide = torch.randn(1, 700, 300, dtype=dtype)
    for x, residual in (wide[..., :100], wide[..., 100:200]), (wide[:, :1, :100].clone(), 9 * wide[:, 1:2, 100:200]):
        total, normed = fused.forward.of_sum(x, residual)
        assert torch.equal(total, x + residual)
        torch.testing.assert_close(normed, plain(x + residual))


def test_rows_that_are_not_finite_stay_so() -> None:
    fused = made(LlamaRMSNorm, 64, torch.bfloat16)
    fuse_norms([fused])
    x = torch.ones(1, 3, 64, dtype=torch.bfloat16)
    x[0, 0, 5], x[0, 1, 6] = torch.nan, torch.inf
    finite = torch.isfinite(fused(x)).all(dim=-1)[0]
    assert finite.tolist() == [False, False, True]


@pytest.mark.parametrize("module", [nn.LayerNorm(64), nn.LayerNorm(64, bias=False), nn.Linear(64, 64)])
def test_what_is_no_rms_norm_keeps_its_forward(module: nn.Module) -> None:
    assert fuse_norms([module.requires_grad_(False)]) == []


def test_types_without_a_library_keep_their_forward() -> None:
    assert fuse_norms([made(LlamaRMSNorm, 64, torch.float64)]) == []

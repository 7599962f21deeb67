"""Rotary positions in one launch; transformers' own function takes ten.

Modelling modules call a function of their own file, ``apply_rotary_pos_emb``. Where ours gives the same numbers on the
layer's shapes, the attention module gets a copy of its forward that finds ours under that name: no other model of the
process is touched, and the library stays as it is. Whatever differs at a call goes to the module's own function.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from onebase.serve.model.trial import noise, replace_forward, same_numbers

_NAME = "apply_rotary_pos_emb"
_TOKENS = 16

Rotary = Callable[..., tuple[Tensor, Tensor]]


@torch.inference_mode()
def fuse_rotary(module: nn.Module, q_heads: int, kv_heads: int, head_dim: int) -> bool:
    """Whether the attention module has ours from now on."""
    forward = type(module).forward
    if not isinstance(forward, types.FunctionType) or _NAME not in forward.__code__.co_names or head_dim % 2:
        return False
    own: Rotary = forward.__globals__[_NAME]
    weight = next(module.parameters(), None)
    if weight is None or not _agree(own, weight, q_heads, kv_heads, head_dim):
        return False
    names = forward.__globals__ | {_NAME: _with_fallback(own)}
    copy = types.FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    copy.__kwdefaults__ = forward.__kwdefaults__
    replace_forward(module, types.MethodType(copy, module))
    return True


def _with_fallback(own: Rotary) -> Rotary:
    from onebase.kernels.fused import rotary

    def apply(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return rotary(*args) if len(args) == 4 and not kwargs and _fits(*args) else own(*args, **kwargs)

    return apply


def _fits(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    one = q.dim() == k.dim() == 4 and cos.dim() == sin.dim() == 3 and q.shape[0] == k.shape[0] == cos.shape[0] == 1
    one = one and q.dtype == k.dtype == cos.dtype == sin.dtype  # float32 tables, as OLMo's, round but once at the end
    whole = cos.shape == sin.shape == (1, q.shape[2], q.shape[3]) if one else False
    return whole and q.stride(3) == k.stride(3) == 1 and cos.is_contiguous() and sin.is_contiguous()


def _agree(own: Rotary, weight: Tensor, q_heads: int, kv_heads: int, dim: int) -> bool:
    from onebase.kernels.fused import DTYPES, rotary

    if weight.dtype not in DTYPES:
        return False
    joint = noise(1, _TOKENS, q_heads + kv_heads, dim, like=weight).transpose(1, 2)
    q, k = joint[:, :q_heads], joint[:, q_heads:]
    cos, sin = (noise(1, _TOKENS, dim, like=weight, seed=seed) for seed in (1, 2))
    try:
        expected = own(q, k, cos, sin)
    except (TypeError, RuntimeError):  # another signature, other shapes
        return False
    return all(map(same_numbers, rotary(q, k, cos, sin), expected))

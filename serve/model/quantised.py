"""Linear modules whose weights are stored in few bits, as transformers loads them: bitsandbytes, torchao, GPTQ, fp8.

Nothing is known of libraries by name. A module is one of these if it says how many features go in and out, and holds no
plain floating-point weight. What it multiplies by is asked of the weight itself, or of the module: its outputs for the
rows of the identity. That is exact for weights in few bits, and for inputs rounded row by row, where a one stays a one.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

_ROWS = 256  # of the identity at once


def is_quantised(module: nn.Module) -> bool:
    """Whether it is a linear module without a plain weight in floating point."""
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return all(isinstance(size, int) for size in sizes) and not list(module.children()) and not _is_plain(module)


def _is_plain(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or type(weight) not in (Tensor, nn.Parameter):
        return False
    return weight.is_floating_point() and weight.dtype.itemsize > 1


@torch.no_grad()
def dense_weight(module: nn.Module, dtype: torch.dtype) -> Tensor:
    """[out_features, in_features] as it is multiplied by, in ``dtype``; made anew. The base's own forward is run, past
    any that was put in its place."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and type(weight).dequantize is not Tensor.dequantize:
        made: Tensor = weight.dequantize()
        return made.to(dtype)
    bare, size = _without_bias(module), int(module.in_features)  # type: ignore[arg-type]
    device = next(tensor.device for tensor in (*module.parameters(), *module.buffers()))
    columns = []
    for start in range(0, size, _ROWS):
        rows = torch.zeros(min(_ROWS, size - start), size, dtype=dtype, device=device)
        rows.diagonal(start).fill_(1)
        columns.append(type(module).forward(bare, rows).to(dtype))
    return torch.cat(columns).T.contiguous()


def _without_bias(module: nn.Module) -> nn.Module:
    """A copy that shares everything but the bias: adding and subtracting one would round."""
    bare = copy.copy(module)
    for kind in ("_parameters", "_buffers"):
        held = getattr(module, kind)
        object.__setattr__(bare, kind, {name: None if name == "bias" else held[name] for name in held})
    return bare


def plain_parts(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a wrapper around several (torchao's weights) is made of; else the tensor itself."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        yield from plain_parts(getattr(tensor, name))

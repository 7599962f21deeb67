"""The type that a base is computed in: what was asked for, or the checkpoint's where this machine is good at it."""

from __future__ import annotations

import time
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers import PreTrainedConfig

from onebase.kernels import prepack

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_ROWS, _WIDTH, _REPEATS = 16, 1024, 5  # of the product that is measured: a decode step's, on weights out of the cache
_MATRICES = 4
_MOST = 1.5  # times float32's: within it bfloat16's half of the memory, and the checkpoint's own numbers, weigh more


def pick_dtype(name: str, config: PreTrainedConfig, device: torch.device) -> torch.dtype:
    """auto is the checkpoint's type. On a CPU it is float32 for float16 checkpoints, for want of float16 units, and for
    bfloat16 ones where products in bfloat16 are found to be slow."""
    if name != "auto":
        return _DTYPES[name]
    stored = config.get_text_config().dtype or config.dtype or torch.float32
    if isinstance(stored, str):
        stored = _DTYPES[stored]
    assert isinstance(stored, torch.dtype)
    if device.type != "cpu" or stored not in (torch.float16, torch.bfloat16):
        return stored
    return stored if stored is torch.bfloat16 and bfloat16_pays() else torch.float32


@cache
def bfloat16_pays() -> bool:
    """Whether this CPU has units for it: without, products are several times slower than in float32, with them faster.
    Another load on the machine slows both."""
    return product_seconds(torch.bfloat16) <= _MOST * product_seconds(torch.float32)


@torch.inference_mode()
def product_seconds(dtype: torch.dtype) -> float:
    """Of one product, the best of some rounds over several weights; without the time that others have the core."""
    x = torch.ones((_ROWS, _WIDTH), dtype=dtype)
    weights = [torch.ones((_WIDTH, _WIDTH), dtype=dtype) for _ in range(_MATRICES)]
    packed = prepack.supported(dtype)
    if packed:
        weights = [prepack.prepack(weight) for weight in weights]
    best = float("inf")
    for _ in range(_REPEATS):
        start = time.thread_time()
        for weight in weights:
            _product(x, weight, packed)
        best = min(best, time.thread_time() - start)
    return best / _MATRICES


def _product(x: Tensor, weight: Tensor, packed: bool) -> Tensor:
    return prepack.product(x, weight) if packed else linear(x, weight)

"""The largest logit of each row, on a CPU through integers: torch's maximum over 16 bits takes fifteen times as long.

Floats are in the order of their bits, where those of negative ones are turned round; only here -0 is less than 0. The
native library goes over a row once. Without it numpy does, twice: among floats of one sign the largest is the largest
signed integer where that is positive, and the smallest unsigned one where all are negative. NaN and infinity are the
largest magnitudes.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from onebase.kernels.native.library import native

NOT_FINITE = -1  # in place of a token where a row's logits hold NaN or +inf, or nothing above -inf
# By dtype: unsigned integers of its size, and the bits of infinity.
_INTEGERS = {
    torch.float32: (np.uint32, 0x7F800000),
    torch.bfloat16: (np.uint16, 0x7F80),
    torch.float16: (np.uint16, 0x7C00),
}
_VIEWS = {2: torch.int16, 4: torch.int32}


def greedy(logits: Tensor) -> Tensor:
    """Of each row the largest logit's place, or NOT_FINITE: int64 [rows], on the same device.

    logits: [rows, vocabulary], any float dtype.
    """
    if logits.device.type != "cpu":
        return plain_greedy(logits)
    library = native(logits.dtype) if logits.stride(1) == 1 else None
    if library is not None:
        tokens = torch.empty(len(logits), dtype=torch.int64)
        library.largest(logits.data_ptr(), logits.stride(0), *logits.shape, tokens.data_ptr())
        return tokens
    return greedy_by_numpy(logits) if logits.dtype in _INTEGERS else plain_greedy(logits)


def greedy_by_numpy(logits: Tensor) -> Tensor:
    """The same of a tensor in host memory, of 16 or 32 bits."""
    unsigned, infinity = _INTEGERS[logits.dtype]
    bits: NDArray[np.signedinteger] = logits.view(_VIEWS[logits.itemsize]).numpy()
    best = bits.argmax(axis=1)
    top = np.take_along_axis(bits, best[:, None], axis=1)[:, 0]
    magnitudes = bits.view(unsigned)
    sign = 1 << (8 * logits.itemsize - 1)
    finite = (top < infinity) & (magnitudes.max(axis=1) <= sign + infinity)
    negative = np.flatnonzero(top < 0)
    if len(negative):
        best[negative] = magnitudes[negative].argmin(axis=1)
        finite[negative] &= magnitudes[negative, best[negative]] < sign + infinity
    return torch.from_numpy(np.where(finite, best, NOT_FINITE))


def plain_greedy(logits: Tensor) -> Tensor:
    """The same in torch: the definition, and the way on other devices."""
    best, tokens = logits.max(dim=-1)
    return tokens.masked_fill(~torch.isfinite(best), NOT_FINITE)

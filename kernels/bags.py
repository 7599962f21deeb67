"""Segmented gathers for rows that share no weights: each row reads its own program's factors, and no others.

torch's embedding_bag is such a gather. A bag is a row of the batch, its samples are the ranks of the row's programs:
- expand is embedding_bag with a weight per sample: y[bag] = sum over its samples of w[sample] * B[index[sample]];
- shrink is the gradient of that by the weights: xa[sample] = x[bag of sample] . A[index[sample]].
Both accumulate in fp32, read every weight once per row, multiply nothing by zero, and need neither masks nor a layout
of oneDNN's. The second is a private operator of torch; ``supported`` says whether it is there.
"""

from __future__ import annotations

import torch
from torch import Tensor


def supported() -> bool:
    """Whether this build of torch has both operators for the CPU."""
    return hasattr(torch.ops.aten, "_embedding_bag_per_sample_weights_backward")


def dots(x: Tensor, weight: Tensor, index: Tensor, bags: Tensor) -> Tensor:
    """x[bags[i]] . weight[index[i]] for every sample i: [samples], of x's dtype.

    x: [rows, width]; weight: [any, width], of any strides, so rows may start anywhere in a buffer, overlapping;
    index, bags: [samples] int64. Indices are not checked.
    """
    samples: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(x, weight, index, bags[:0], bags, 0)
    return samples


def sums(samples: Tensor, weight: Tensor, index: Tensor, offsets: Tensor) -> Tensor:
    """Per bag, the sum of samples[i] * weight[index[i]]: [bags, width]. Bag b: [offsets[b], offsets[b + 1]).

    weight: [any, width], contiguous (a copy would be made of anything else); index, offsets: of one integer type.
    """
    return torch.embedding_bag(weight, index, offsets, False, 0, False, samples, False)[0]


def rows_anywhere(buffer: Tensor, width: int) -> Tensor:
    """The rows of ``width`` elements that start at each element of a flat buffer: a view."""
    return buffer.as_strided((max(0, buffer.numel() - width + 1), width), (1, 1))

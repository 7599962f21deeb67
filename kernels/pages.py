"""One layer's K/V pages. Who owns which page is the engine's business; this only holds the bytes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class PageCache:
    """K and V of one layer in one allocation.

    ``data``: [2, num_pages, page_size, kv_heads, head_dim]. Every body may index it so; the strides differ by device.
    On CUDA tokens come before heads in memory (what FlashAttention's block tables expect); on the CPU heads come before
    tokens, so that a gather of pages leaves each head contiguous and the matmuls read it without another copy.
    """

    data: Tensor

    @classmethod
    def allocate(
        cls, num_pages: int, page_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> PageCache:
        """Zeroed, so that the memory is committed now and not in the middle of serving."""
        if device.type == "cpu":
            data = torch.zeros(2, num_pages, num_kv_heads, page_size, head_dim, dtype=dtype, device=device)
            return cls(data.transpose(2, 3))
        return cls(torch.zeros(2, num_pages, page_size, num_kv_heads, head_dim, dtype=dtype, device=device))

    @staticmethod
    def bytes_per_page(page_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        """Bytes of one page of one layer, K and V together."""
        return 2 * page_size * num_kv_heads * head_dim * dtype.itemsize

    def write(self, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Put k and v [T, kv_heads, head_dim] at flat slots (page * page_size + offset), int64 [T]."""
        place = (slots // self.page_size, slots % self.page_size)
        self.k[place], self.v[place] = k, v

    @property
    def k(self) -> Tensor:
        """[num_pages, page_size, kv_heads, head_dim]"""
        return self.data[0]

    @property
    def v(self) -> Tensor:
        """[num_pages, page_size, kv_heads, head_dim]"""
        return self.data[1]

    @property
    def num_pages(self) -> int:
        return self.data.shape[1]

    @property
    def page_size(self) -> int:
        return self.data.shape[2]

    @property
    def num_kv_heads(self) -> int:
        return self.data.shape[3]

    @property
    def head_dim(self) -> int:
        return self.data.shape[4]

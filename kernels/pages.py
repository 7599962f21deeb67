"""One layer's K/V pages. Who owns which page is the engine's business; this only holds the bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# What a slot's bytes are a multiple of: slots of any type begin where adapters' blocks may end, and GPUs read at once.
SLOT_ALIGN = 256


@dataclass(frozen=True, slots=True)
class LayerShape:
    """K/V of one layer: what its pages have to hold."""

    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    def bytes_per_page(self, page_size: int) -> int:
        return PageCache.bytes_per_page(page_size, self.num_kv_heads, self.head_dim, self.dtype)


@dataclass(frozen=True, slots=True)
class SlotLayout:
    """How one page of every layer lies in a slot of ``nbytes``: layer after layer, K before V. offsets: in bytes."""

    offsets: tuple[int, ...]
    nbytes: int

    @classmethod
    def of(cls, shapes: Sequence[LayerShape], page_size: int) -> SlotLayout:
        """A slot is whole multiples of each layer's heads, so that a head's page has a row number in every layer."""
        sizes = [shape.bytes_per_page(page_size) for shape in shapes]
        heads = {page_size * shape.head_dim * shape.dtype.itemsize for shape in shapes}
        grain = math.lcm(SLOT_ALIGN, *heads)
        starts = [sum(sizes[:index]) for index in range(len(sizes))]
        return cls(tuple(starts), -(-sum(sizes) // grain) * grain)


@dataclass(frozen=True, slots=True, eq=False)
class PageCache:
    """K and V of one layer: in an allocation of its own, or in slots that hold a page of every layer.

    ``data``: [2, num_pages, page_size, kv_heads, head_dim]. Every body may index it so; the strides differ by device
    and by place. On CUDA tokens come before heads in memory (what FlashAttention's block tables expect); on the CPU
    heads come before tokens, so that a gather of pages leaves each head contiguous and the matmuls read it without
    another copy.
    """

    data: Tensor

    @classmethod
    def allocate(
        cls, num_pages: int, page_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> PageCache:
        """Zeroed, so that the memory is committed now and not in the middle of serving."""
        shape = LayerShape(num_kv_heads, head_dim, dtype, device)
        nbytes = shape.bytes_per_page(page_size)
        buffer = torch.zeros(num_pages * nbytes, dtype=torch.uint8, device=device)
        half, page = num_pages * nbytes // 2, nbytes // 2
        return cls(_laid_out(buffer, shape, page_size, num_pages, 0, half // dtype.itemsize, page // dtype.itemsize))

    @classmethod
    def within(
        cls, buffer: Tensor, shape: LayerShape, page_size: int, num_pages: int, offset: int, slot_bytes: int
    ) -> PageCache:
        """Pages of a layer at ``offset`` of each of ``num_pages`` slots. buffer: uint8, 1-D; the slots are its first
        ones. It is not written."""
        size = shape.dtype.itemsize
        half = shape.bytes_per_page(page_size) // 2
        return cls(_laid_out(buffer, shape, page_size, num_pages, offset // size, half // size, slot_bytes // size))

    @staticmethod
    def bytes_per_page(page_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        """Bytes of one page of one layer, K and V together."""
        return 2 * page_size * num_kv_heads * head_dim * dtype.itemsize

    def single(self) -> PageCache:
        """One page of its own with the same distances between slots: kernels compiled for it are compiled for this."""
        _, *strides = self.data.stride()
        half = self.data[0, 0].numel()
        shape = (2, 1, *self.data.shape[2:])
        data = torch.empty_strided(shape, (half, *strides), dtype=self.data.dtype, device=self.data.device)
        return PageCache(data.zero_())

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


def _laid_out(
    buffer: Tensor, shape: LayerShape, page_size: int, num_pages: int, offset: int, half: int, page: int
) -> Tensor:
    """[2, num_pages, page_size, kv_heads, head_dim]; offset and distances in elements."""
    heads, dim = shape.num_kv_heads, shape.head_dim
    token, head = (dim, page_size * dim) if buffer.device.type == "cpu" else (heads * dim, dim)
    sizes, strides = (2, num_pages, page_size, heads, dim), (half, page, token, head, 1)
    return buffer.view(shape.dtype).as_strided(sizes, strides, offset)

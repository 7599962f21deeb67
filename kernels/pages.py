"""One layer's K/V pages. Who owns which page is the engine's business; this only holds the bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from onebase.kernels import kv_fp8

# What a slot's bytes are a multiple of: slots of any type begin where adapters' blocks may end, and GPUs read at once.
SLOT_ALIGN = 256


@dataclass(frozen=True, slots=True)
class LayerShape:
    """K/V of one layer: what its pages have to hold. dtype: of the values; fp8: they are stored as kv_fp8 has them."""

    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    fp8: bool = False

    @property
    def stored(self) -> torch.dtype:
        """Of an element in memory."""
        return torch.uint8 if self.fp8 else self.dtype

    def head_bytes(self, page_size: int) -> int:
        """K or V of one head in one page."""
        return page_size * (self.head_dim + self.fp8) * self.stored.itemsize

    def bytes_per_page(self, page_size: int) -> int:
        """K and V together."""
        return 2 * self.num_kv_heads * self.head_bytes(page_size)


@dataclass(frozen=True, slots=True)
class SlotLayout:
    """How one page of every layer lies in a slot of ``nbytes``: layer after layer, K before V. offsets: in bytes."""

    offsets: tuple[int, ...]
    nbytes: int

    @classmethod
    def of(cls, shapes: Sequence[LayerShape], page_size: int) -> SlotLayout:
        """A slot is whole multiples of each layer's heads, so that a head's page has a row number in every layer."""
        sizes = [shape.bytes_per_page(page_size) for shape in shapes]
        heads = {shape.head_bytes(page_size) for shape in shapes}
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

    dtype: of K and V as attention reads them. In fp8 ``data`` holds codes, uint8, and ``exponents`` [2, num_pages,
    page_size, kv_heads] what they are scaled by (kv_fp8); heads come before tokens on every device, and a head's
    exponents lie behind its codes, so that one gather fetches both.
    """

    data: Tensor
    dtype: torch.dtype
    exponents: Tensor | None = None

    @classmethod
    def allocate(
        cls, num_pages: int, page_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> PageCache:
        """Zeroed, so that the memory is committed now and not in the middle of serving."""
        return cls.of_shape(LayerShape(num_kv_heads, head_dim, dtype, device), page_size, num_pages)

    @classmethod
    def of_shape(cls, shape: LayerShape, page_size: int, num_pages: int) -> PageCache:
        """Zeroed pages of their own: K of all of them, then V."""
        nbytes, size = shape.bytes_per_page(page_size), shape.stored.itemsize
        buffer = torch.zeros(num_pages * nbytes, dtype=torch.uint8, device=shape.device)
        half, page = num_pages * nbytes // 2, nbytes // 2
        return _laid_out(buffer, shape, page_size, num_pages, 0, half // size, page // size)

    @classmethod
    def within(
        cls, buffer: Tensor, shape: LayerShape, page_size: int, num_pages: int, offset: int, slot_bytes: int
    ) -> PageCache:
        """Pages of a layer at ``offset`` of each of ``num_pages`` slots. buffer: uint8, 1-D; the slots are its first
        ones. It is not written."""
        size = shape.stored.itemsize
        half = shape.bytes_per_page(page_size) // 2
        return _laid_out(buffer, shape, page_size, num_pages, offset // size, half // size, slot_bytes // size)

    @staticmethod
    def bytes_per_page(page_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        """Bytes of one page of one layer, K and V together."""
        return 2 * page_size * num_kv_heads * head_dim * dtype.itemsize

    def single(self) -> PageCache:
        """One page of its own with the same distances between slots: kernels compiled for it are compiled for this."""
        exponents = None if self.exponents is None else _one_page(self.exponents)
        return PageCache(_one_page(self.data), self.dtype, exponents)

    def write(self, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Put k and v [T, kv_heads, head_dim] at flat slots (page * page_size + offset), int64 [T]."""
        self.put(slots // self.page_size, slots % self.page_size, torch.stack((k, v)))

    def put(self, pages: Tensor, offsets: Tensor, kv: Tensor) -> None:
        """Put K and V, kv [2, T, kv_heads, head_dim], at these places of these pages, int64 [T] each."""
        if self.exponents is None:
            self.data[:, pages, offsets] = kv.to(self.dtype)
        else:
            self.data[:, pages, offsets], self.exponents[:, pages, offsets] = kv_fp8.encode(kv)

    def read(self, half: int, pages: Tensor) -> Tensor:
        """K (half 0) or V (1) of these pages, int64 [n] -> [n, page_size, kv_heads, head_dim] in ``dtype``."""
        stored = self.data[half][pages]
        return stored if self.exponents is None else kv_fp8.decode(stored, self.exponents[half][pages], self.dtype)

    @property
    def k(self) -> Tensor:
        """[num_pages, page_size, kv_heads, head_dim]"""
        return self.data[0]

    @property
    def v(self) -> Tensor:
        """[num_pages, page_size, kv_heads, head_dim]"""
        return self.data[1]

    @property
    def fp8(self) -> bool:
        return self.exponents is not None

    @property
    def head_items(self) -> int:
        """Elements of K or V of one head in one page."""
        return self.page_size * (self.head_dim + self.fp8)

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
) -> PageCache:
    """offset and distances in elements."""
    heads, dim, codes = shape.num_kv_heads, shape.head_dim, page_size * shape.head_dim
    heads_first = buffer.device.type == "cpu" or shape.fp8
    token, head = (dim, codes + page_size * shape.fp8) if heads_first else (heads * dim, dim)
    sizes, strides = (2, num_pages, page_size, heads, dim), (half, page, token, head, 1)
    stored = buffer.view(shape.stored)
    data = stored.as_strided(sizes, strides, offset)
    exponents = stored.as_strided(sizes[:-1], (half, page, 1, head), offset + codes) if shape.fp8 else None
    return PageCache(data, shape.dtype, exponents)


def _one_page(x: Tensor) -> Tensor:
    """Zeros [2, 1, ...] with the strides that x [2, num_pages, ...] has."""
    _, *strides = x.stride()
    half = sum((size - 1) * stride for size, stride in zip(x.shape[2:], strides[1:], strict=True)) + 1
    return torch.empty_strided((2, 1, *x.shape[2:]), (half, *strides), dtype=x.dtype, device=x.device).zero_()

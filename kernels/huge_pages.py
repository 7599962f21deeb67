"""Memory in pages of 2 MiB: what streams through gigabytes looks up a fraction of the addresses."""

from __future__ import annotations

import ctypes
import mmap
from contextlib import suppress

from torch import Tensor

_LEAST_BYTES = 1 << 22


def advise(buffer: Tensor) -> None:
    """Ask the kernel for huge pages below a buffer in host memory; best before anything is written to it.

    A hint: where the system has none, or forbids them, nothing changes.
    """
    size, page = buffer.numel() * buffer.element_size(), mmap.PAGESIZE
    if buffer.device.type != "cpu" or size < _LEAST_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    start = -(-buffer.data_ptr() // page) * page
    length = (buffer.data_ptr() + size - start) // page * page
    with suppress(AttributeError):  # a C library without it
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), ctypes.c_int(mmap.MADV_HUGEPAGE))

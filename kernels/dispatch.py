"""Picks the body of the low-rank kernels once, by the device of the arena."""

from __future__ import annotations

from typing import Literal

from onebase.kernels.base import LowRankKernels
from onebase.kernels.cpu import CpuKernels
from onebase.kernels.cpu_tuning import measured
from onebase.kernels.reference import ReferenceKernels
from onebase.kernels.tables import ProgramTables

Choice = Literal["auto", "triton", "cpu", "reference"]


def select_kernels(tables: ProgramTables, choice: Choice = "auto") -> LowRankKernels:
    """The body for the tables' device: auto takes triton on CUDA and cpu on the CPU.

    Raises ValueError where the choice cannot run on that device.
    """
    device = tables.buffer.device.type
    if choice == "auto":
        choice = "triton" if device == "cuda" else "cpu"
    if choice == "triton":
        from onebase.kernels.matmul_triton import TritonKernels

        return TritonKernels(tables)
    if choice == "cpu":
        if device != "cpu":
            raise ValueError(f"choice: cpu needs an arena in host memory, not on {device}")
        return CpuKernels(tables, measured(tables.buffer.dtype))
    if choice == "reference":
        return ReferenceKernels(tables)
    raise ValueError(f"choice: {choice!r} is not one of auto, triton, cpu, reference")

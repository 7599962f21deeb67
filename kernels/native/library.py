"""The compiled library as Python calls it. The C sources say what each function does.

Callers see to it that shapes, strides and dtypes fit: nothing is checked behind this.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_float, c_int, c_int64, c_void_p
from functools import cache
from typing import Any, ClassVar

import torch

from onebase.kernels.native.build import library

_SUFFIXES = {torch.bfloat16: "bf16", torch.float32: "f32"}
_P, _N, _F = c_void_p, c_int64, c_float


class Pages(Structure):
    """``struct pages``: distances in elements."""

    _fields_: ClassVar[Any] = [(name, _P if name == "data" else _N) for name in
                               ("data", "page", "head", "half", "page_size", "heads", "dim")]  # fmt: skip


class Queries(Structure):
    """``struct queries``. rows int64, sequences and positions int32, tables int32, sinks float32."""

    _fields_: ClassVar[Any] = [
        ("data", _P), ("token", _N), ("head", _N), ("group", _N), ("rows", _P), ("sequences", _P), ("positions", _P),
        ("count", _N), ("tables", _P), ("table_width", _N), ("scale", _F), ("softcap", _F), ("window", _N),
        ("sinks", _P),
    ]  # fmt: skip


class Updates(Structure):
    """``struct updates``. rows, firsts, programs int64, scales float64; sums and xa: float32 scratch."""

    _fields_: ClassVar[Any] = [
        ("arena", _P), ("table", _P), ("program", _N), ("rows", _P), ("firsts", _P), ("programs", _P), ("scales", _P),
        ("count", _N), ("threads", _N), ("sums", _P), ("most", _N), ("xa", _P), ("ranks", _N),
    ]  # fmt: skip


_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "rms_norm": (_P, _P, _P, _P, _P, _N, _N, _F, _F, c_int),
    "largest": (_P, _N, _N, _N, _P),
    "write_pages": (POINTER(Pages), _P, _N, _N, _P, _N, _N, _P, _N),
    "attend": (POINTER(Pages), POINTER(Queries), _P),
    "low_rank": (POINTER(Updates), POINTER(_N)),
}


class Native:
    """The functions for one element type. Threads: as many as torch uses, and the same ones."""

    rms_norm: Any
    largest: Any
    write_pages: Any
    attend: Any
    low_rank: Any

    def __init__(self, loaded: ctypes.CDLL, suffix: str) -> None:
        for name, arguments in _ARGUMENTS.items():
            function = getattr(loaded, f"{name}_{suffix}")
            function.argtypes, function.restype = arguments, None
            setattr(self, name, function)


@cache
def native(dtype: torch.dtype) -> Native | None:
    """For tensors of this type in host memory; None where there is no library, or none for the type."""
    loaded = _loaded() if dtype in _SUFFIXES else None
    return None if loaded is None else Native(loaded, _SUFFIXES[dtype])


def available() -> bool:
    """Whether there is a library at all."""
    return _loaded() is not None


def has_wide_vectors() -> bool:
    """Whether attention and gathers in C pay here. They are written for registers of 64 bytes; with smaller ones,
    compilers spill them, and torch's own operations are two to three times as fast."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


@cache
def _loaded() -> ctypes.CDLL | None:
    path = library()
    return None if path is None else ctypes.CDLL(str(path))

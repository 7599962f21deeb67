"""An opened adapter folder: config fields and tensors, each to be consumed exactly once."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from onebase.adapters.check import check_folder, ensure_finite, read_values
from onebase.adapters.errors import AdapterRejected
from onebase.adapters.formats.fields import Fields
from onebase.adapters.safetensors_header import TensorInfo

FACTOR_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTEGER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class TensorBag:
    """The tensors of a folder by key. ``take`` reads one; ``finish`` refuses the adapter if one was never taken."""

    def __init__(self, tensors: Mapping[str, TensorInfo]) -> None:
        self._left = dict(tensors)

    def __iter__(self) -> Iterator[str]:
        """Keys not yet taken, in the file's order; safe to take from while iterating."""
        return iter(tuple(self._left))

    def shape(self, key: str) -> tuple[int, ...]:
        return self._left[key].shape

    def take(self, key: str) -> Tensor:
        """The tensor, on the host, contiguous, floating and finite. Raises AdapterRejected naming the key."""
        tensor = self._take(key, FACTOR_DTYPES, "F32, BF16 and F16 are served")
        ensure_finite(key, tensor)
        return tensor

    def take_integers(self, key: str) -> Tensor:
        """The tensor, on the host, contiguous, of any integer dtype (not bool). Bounds are the caller's to check.

        Raises AdapterRejected naming the key.
        """
        return self._take(key, INTEGER_DTYPES, "integers are expected")

    def drop(self, key: str) -> None:
        """A tensor that only training reads."""
        del self._left[key]

    def dtype(self, key: str) -> torch.dtype:
        return self._left[key].dtype

    def _take(self, key: str, served: Collection[torch.dtype], expected: str) -> Tensor:
        info = self._left.pop(key)
        if info.dtype not in served:
            raise AdapterRejected(f"The dtype of {key!r} is {info.dtype}; {expected}.", param=key)
        with info.file.open("rb") as stream:
            return read_values(stream, info, 0, info.nbytes).view(info.shape)

    def finish(self) -> None:
        for key in self._left:
            raise AdapterRejected(
                f"The tensor {key!r} has no meaning in this adapter ({len(self._left)} such): it would be dropped.",
                param=key,
            )


class AdapterFiles:
    """What a family's compiler gets: ``fields`` of the config and ``tensors``. Raises AdapterRejected on opening."""

    def __init__(self, path: Path) -> None:
        folder = check_folder(path)
        self.family = folder.family
        self.fields = Fields(folder.config)
        self.tensors = TensorBag(folder.tensors)

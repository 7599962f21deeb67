"""The one place that opens a pickle: a process of its own, started by convert.py and by nobody else.

``python -m onebase.adapters.unpickle SOURCE TARGET MAX_BYTES`` reads one file with torch's restricted unpickler
(weights_only=True: tensors and containers, no code), under limits on memory, time and output, and writes safetensors.
What is wrong is one line on standard error, with exit status 1.
"""

from __future__ import annotations

import resource
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from onebase.adapters.safetensors_header import DTYPES, MAX_TENSORS

CPU_SECONDS = 600
_SPARE_BYTES = 1 << 30  # for the unpickler itself, beside the file's own bytes
_POOL = ".prefix_tuning.pool."  # where AdapterHub's library saves a prefix once more for every layer


class Unusable(Exception):
    """Why the file is no adapter, for the user."""


def main(source: Path, target: Path, max_bytes: int) -> None:
    _limit(source.stat().st_size, max_bytes)
    tensors = _checked(_load(source), max_bytes)
    save_file(tensors, target, metadata={"format": "pt"})


def _limit(file_bytes: int, max_bytes: int) -> None:
    """The address space may grow by a few times the file; what was mapped at start (torch, say) stays allowed."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    memory = pages * resource.getpagesize() + 4 * min(file_bytes, max_bytes) + _SPARE_BYTES
    for name, limit in {"AS": memory, "CPU": CPU_SECONDS, "FSIZE": max_bytes, "CORE": 0}.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        lowered = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (lowered, lowered))


def _load(source: Path) -> object:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded: object = torch.load(source, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # a hostile file may raise anything here
        reason = " ".join(str(error).split())[:200]
        raise Unusable(f"it is no pickle of tensors alone ({type(error).__name__}: {reason})") from None
    return loaded


def _checked(loaded: object, max_bytes: int) -> dict[str, Tensor]:
    """Every tensor contiguous and in memory of its own."""
    if not isinstance(loaded, Mapping):
        raise Unusable(f"it holds a {type(loaded).__name__}, not a table of tensors")
    if not loaded:
        raise Unusable("it is empty: a file of about 443 bytes without a tensor, which some training scripts leave")
    if len(loaded) > MAX_TENSORS:
        raise Unusable(f"it has {len(loaded)} tensors; at most {MAX_TENSORS} are allowed")
    kept = _without_copies({_key(key): _tensor(key, value) for key, value in loaded.items()})
    total = sum(tensor.numel() * tensor.element_size() for tensor in kept.values())
    if total > max_bytes:
        raise Unusable(f"its tensors take {total} bytes; at most {max_bytes} are allowed")
    return {key: tensor.detach().clone(memory_format=torch.contiguous_format) for key, tensor in kept.items()}


def _key(key: object) -> str:
    if not isinstance(key, str) or not key or len(key) > 1024 or not key.isprintable():
        raise Unusable(f"the key {key!r:.100} is no tensor's name")
    return key


def _tensor(key: object, value: object) -> Tensor:
    tensor = value.data if type(value) is torch.nn.Parameter else value
    if not isinstance(tensor, Tensor) or type(tensor) is not Tensor:
        raise Unusable(f"{key!r:.200} is a {type(value).__name__}, not a tensor")
    if tensor.layout is not torch.strided or tensor.device.type != "cpu" or tensor.dtype not in DTYPES.values():
        raise Unusable(f"{key!r:.200} is a {tensor.layout} tensor of {tensor.dtype}, which safetensors cannot hold")
    return tensor


def _without_copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A pool's entries that share memory with one that is kept are dropped; the compiler needs one of them."""
    kept = {key: tensor for key, tensor in tensors.items() if _POOL not in key}
    seen = {_place(tensor) for tensor in kept.values()}
    for key, tensor in tensors.items():
        if _POOL in key and _place(tensor) not in seen:
            seen.add(_place(tensor))
            kept[key] = tensor
    return kept


def _place(tensor: Tensor) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
    except Unusable as problem:
        sys.exit(str(problem))
    except (MemoryError, RuntimeError):
        sys.exit("it needs more memory than a file of its size should")

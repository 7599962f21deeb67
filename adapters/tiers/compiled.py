"""Compiled adapters on disk: one safetensors file each, in arena layout, so that a load is one read and one copy.

    <root>/<digest of the adapter's files>/<base>-<dtype>-<compiler>.safetensors
        data          the program's own tensors, as they lie in the arena
        shared.<key>  what it shares with others, by content
        program       all the rest, as JSON (codec.py)
        checksum      CRC-32 of the three above

It is a cache: whatever cannot be read is compiled again from the adapter's files, and a write that fails costs nothing
but the next compilation. It belongs to the server, like its database; the checksum is against damage, not against
somebody who can write there. All methods may be called by several threads.

A form goes with its adapter, or with the next compiler's form for the same base, or, where the folder has a limit, when
it was read longest ago and others need its room. None is written that would leave the disk nearly full: the registry
and uploads come first.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

import numpy
import torch
from torch import Tensor

from onebase.adapters.errors import AdapterError
from onebase.adapters.packing import PackedProgram
from onebase.adapters.safetensors_header import DTYPES, TensorInfo, read_header
from onebase.adapters.tiers.codec import Unreadable, from_plain, to_plain
from onebase.kernels import ops, tables

_LEAST_FREE, _LEAST_SHARE = 1 << 30, 0.02  # left on the disk by writes: bytes, or a share where that is less
_FULL_AGAIN = 0.9  # of the limit, after forms were dropped for others
_APART = ("registry", "sources", "watch.py")  # of adapters/: they have no part in compilation
_OF_TIERS = ("arena.py", "codec.py", "compiled.py")  # these have
_ALIGN = 4096  # bytes: the tensors start at a border of pages
_MOST_BUFFERS = 1024  # that one call of preadv fills
_DIGEST = re.compile(r"[0-9a-f]{64}")
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# What a damaged form may raise: its JSON may be nested without end, its sizes may ask for any memory.
_DAMAGED = (OSError, AdapterError, Unreadable, ValueError, ArithmeticError, RuntimeError, MemoryError)
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class FormCounts:
    """What is on disk, and what became of reading and writing it. files: of this base, dtype and compiler. nbytes: of
    all forms, those of other bases too."""

    files: int = 0
    nbytes: int = 0
    hits: int = 0
    misses: int = 0
    failures: int = 0  # damaged ones, and writes that failed
    _lock: Lock = field(default_factory=Lock)

    def add(self, *, files: int = 0, nbytes: int = 0, hits: int = 0, misses: int = 0, failures: int = 0) -> None:
        with self._lock:
            self.files += files
            self.nbytes += nbytes
            self.hits += hits
            self.misses += misses
            self.failures += failures


class CompiledForms:
    """The compiled forms of one base in one dtype."""

    def __init__(
        self, root: Path, base: str, dtype: torch.dtype, *, pinned: bool = False, most_bytes: int | None = None
    ) -> None:
        """base: all that the compiler knows of the base, as one string. pinned: read into page-locked memory.
        most_bytes: of all forms in ``root``, those of other bases too; None for as many as the disk has room for."""
        self.counts = FormCounts()
        self._root = root
        self._pinned = pinned
        self._dtype = dtype
        self._most_bytes = most_bytes
        self._of_base = f"{_hash(base)[:16]}-{_NAMES[dtype].lower()}-"
        self._name = f"{self._of_base}{compiler_version()[:16]}.safetensors"

    def read(self, digest: str) -> PackedProgram | None:
        """None where there is no form, or a damaged one."""
        path = self._folder(digest) / self._name
        try:
            packed = _read(path, digest, self._dtype, pinned=self._pinned)
        except FileNotFoundError:
            self.counts.add(misses=1)
            return None
        except _DAMAGED as error:
            _log.warning("compiled form %s is unreadable, compiling again: %s", path, error)
            self.counts.add(misses=1, failures=1)
            return None
        self.counts.add(hits=1)
        if self._most_bytes is not None:
            with suppress(OSError):
                os.utime(path)  # the order in which forms go
        return packed

    def write(self, packed: PackedProgram) -> None:
        """Durable when it returns, in the place of what was there; where that fails, nothing is there."""
        folder = self._folder(packed.digest)
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            _require_room(self._root, packed, self._most_bytes)
            folder.mkdir(exist_ok=True)
            before = _size(folder / self._name)
            _write(folder / self._name, _parts(packed))
            self.counts.add(files=int(before == 0), nbytes=_size(folder / self._name) - before)
            self._drop_older(folder)
            self._drop_unread(folder / self._name)
        except OSError as error:
            _log.warning("compiled form of %s was not written: %s", packed.digest, error)
            self.counts.add(failures=1)

    def _drop_unread(self, kept: Path) -> None:
        """Where there is a limit and this write has passed it: forms go that were read longest ago, until a tenth is
        free, so that not every write looks at every file."""
        if self._most_bytes is None or self.counts.nbytes <= self._most_bytes:
            return
        self.survey()
        found = sorted((_read_at(path), path) for path in self._root.glob("*/*.safetensors") if path != kept)
        for _, path in found:
            if self.counts.nbytes <= self._most_bytes * _FULL_AGAIN:
                return
            size = _size(path)
            path.unlink(missing_ok=True)
            self.counts.add(files=-int(path.name == self._name), nbytes=-size)

    def survey(self) -> None:
        """Count what is on disk. Looks at every file: for a thread that nobody waits for."""
        sizes = [(path.name, _size(path)) for path in self._root.glob("*/*.safetensors")]
        files, nbytes = sum(name == self._name for name, _ in sizes), sum(size for _, size in sizes)
        self.counts.add(files=files - self.counts.files, nbytes=nbytes - self.counts.nbytes)

    def _folder(self, digest: str) -> Path:
        """Tests and benchmarks name adapters by their folders: such names must not lead out of the root."""
        return self._root / (digest if _DIGEST.fullmatch(digest) else _hash(digest))

    def _drop_older(self, folder: Path) -> None:
        """Forms that older compilers made for the same base."""
        for path in folder.glob(f"{self._of_base}*"):
            if path.name != self._name:
                path.unlink(missing_ok=True)


@functools.cache
def compiler_version() -> str:
    """A digest of what decides what an adapter compiles to, so that nobody has to count versions."""
    total = hashlib.sha256(f"{torch.__version__} {numpy.__version__}".encode())
    for name, file in compiler_files().items():
        total.update(f"{name}\0".encode() + file.read_bytes())
    return total.hexdigest()


def compiler_files() -> dict[str, Path]:
    """The source files among it, by name: all of adapters/ but what only keeps, fetches and moves adapters, and the
    instructions. Rather one too many: a change of it costs a compilation."""
    adapters, files = Path(__file__).parents[1], {"tables": Path(tables.__file__)}
    for file in sorted(Path(ops.__path__[0]).rglob("*.py")):
        files[f"ops/{file.name}"] = file
    for file in sorted(adapters.rglob("*.py")):
        name = file.relative_to(adapters)
        if name.parts[0] not in _APART and (name.parts[0] != "tiers" or name.name in _OF_TIERS):
            files[name.as_posix()] = file
    return files


def _require_room(root: Path, packed: PackedProgram, most_bytes: int | None) -> None:
    """Raises OSError where the form would leave the disk too little, or is larger than all forms may be."""
    nbytes = packed.nbytes + sum(flat.numel() * flat.element_size() for flat in packed.shared.values())
    if most_bytes is not None and nbytes > most_bytes * _FULL_AGAIN:
        raise OSError(errno.ENOSPC, f"it has {nbytes} bytes, and all forms together may have {most_bytes}")
    disk = shutil.disk_usage(root)
    if disk.free - nbytes < min(_LEAST_FREE, disk.total * _LEAST_SHARE):
        raise OSError(errno.ENOSPC, f"it would leave {max(disk.free - nbytes, 0)} bytes free on the disk")


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _read_at(path: Path) -> float:
    with suppress(OSError):
        return path.stat().st_mtime
    return 0.0


def _size(path: Path) -> int:
    with suppress(OSError):
        return path.stat().st_size
    return 0


def _bytes(tensor: Tensor) -> memoryview:
    """A tensor's memory."""
    return tensor.view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")


def _parts(packed: PackedProgram) -> dict[str, Tensor]:
    """The file's tensors, in its order."""
    program = json.dumps(to_plain(packed), separators=(",", ":")).encode()
    parts = {"data": packed.data} | {f"shared.{key}": flat for key, flat in packed.shared.items()}
    parts["program"] = _tensor_of(program)
    return parts | {"checksum": _tensor_of(_checksum(parts.values()))}


def _tensor_of(raw: bytes) -> Tensor:
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)


def _checksum(tensors: Iterable[Tensor]) -> bytes:
    value = 0
    for tensor in tensors:
        value = zlib.crc32(_bytes(tensor), value)
    return value.to_bytes(4, "little")


def _write(path: Path, parts: dict[str, Tensor]) -> None:
    """To a temporary name in the same folder, to the disk, then to its name."""
    draft = path.with_name(f".{path.name}")  # one writer for each adapter: what a crash leaves is written over
    try:
        with draft.open("wb") as file:
            file.write(_header(parts))
            for tensor in parts.values():
                file.write(_bytes(tensor))
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException:
        with suppress(OSError):
            draft.unlink()
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _header(parts: dict[str, Tensor]) -> bytes:
    """Padded, so that the first tensor starts at a border of pages."""
    entries, at = {}, 0
    for name, tensor in parts.items():
        end = at + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    raw = json.dumps(entries, separators=(",", ":")).encode()
    raw += b" " * (-(len(raw) + 8) % _ALIGN)
    return len(raw).to_bytes(8, "little") + raw


def _read(path: Path, digest: str, dtype: torch.dtype, *, pinned: bool) -> PackedProgram:
    """Raises Unreadable, or what the readers of headers and JSON raise, for all but a whole form of this adapter."""
    infos = read_header(path)
    tensors = {name: _room_for(info, pinned=pinned) for name, info in infos.items()}
    with path.open("rb", buffering=0) as file:
        _fill(file.fileno(), [_bytes(tensor) for tensor in tensors.values()], min(i.offset for i in infos.values()))
    checksum, program, data = (tensors.pop(name, None) for name in ("checksum", "program", "data"))
    if checksum is None or program is None or data is None or data.dtype is not dtype:
        raise Unreadable("it is no compiled form")
    if bytes(_bytes(checksum)) != _checksum([data, *tensors.values(), program]):
        raise Unreadable("its checksum is wrong")
    shared = {name.removeprefix("shared."): tensor for name, tensor in tensors.items()}
    packed = from_plain(json.loads(bytes(_bytes(program))), data, shared)
    if packed.digest != digest:
        raise Unreadable(f"it is of {packed.digest}")
    return packed


def _room_for(info: TensorInfo, *, pinned: bool) -> Tensor:
    return torch.empty(info.shape, dtype=info.dtype, pin_memory=pinned and info.dtype is not torch.uint8)


def _fill(file: int, buffers: list[memoryview], offset: int) -> None:
    """Read the file from an offset on into the buffers, one after the other: one system call for most adapters."""
    left = [buffer for buffer in buffers if len(buffer)]
    while left:
        count = os.preadv(file, left[:_MOST_BUFFERS], offset)
        if count == 0:
            raise Unreadable("it ends too early")
        offset += count
        left = list(_after(left, count))


def _after(buffers: list[memoryview], count: int) -> Iterator[memoryview]:
    """What is left of the buffers once their first ``count`` bytes are full."""
    for buffer in buffers:
        skipped = min(count, len(buffer))
        count -= skipped
        if skipped < len(buffer):
            yield buffer[skipped:]

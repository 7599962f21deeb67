"""Hostile-input checks of an adapter folder, before any library parses it.

Nothing here knows what a family computes, or a base model: what passes is a well-formed folder with finite numbers.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from io import BufferedReader
from pathlib import Path

import torch
from torch import Tensor

from onebase.adapters.errors import AdapterRejected, AdapterTooLarge
from onebase.adapters.family_names import family_of
from onebase.adapters.safetensors_header import MAX_TENSORS, TensorInfo, read_header
from onebase.adapters.strict_json import JsonError, JsonValue, parse_strict

CONFIG_FILE = "adapter_config.json"
MAX_CONFIG_BYTES = 1 << 20
MAX_FILES = 64
CHUNK_BYTES = 16 << 20

IGNORED_FILES = (
    "README.md",
    "LICENSE",
    "LICENSE.txt",
    ".gitattributes",
    ".gitignore",
    ".cache",
    "tokenizer.model",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
    "head_config.json",
    "trainer_state.json",
)
# Of an adapter's own tokenizer, with the bytes that each may have.
TOKENIZER_FILES: Mapping[str, int] = {
    "tokenizer.json": 64 << 20,
    "tokenizer_config.json": 4 << 20,
    "special_tokens_map.json": 1 << 20,
    "chat_template.jinja": 1 << 20,
}
_FUSION = "AdapterFusion mixes the outputs of several adapters by attention, which is not served; load them one by one"
_REFUSED_FILES = {
    "adapter_fusion_config.json": _FUSION,
    "model_adapter_fusion.safetensors": _FUSION,
    "adapter_interface.json": "it was trained through AdapterHub's plug-in interface, which puts adapters elsewhere",
}
_TENSOR_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,120}\.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


class FileRole(StrEnum):
    """What a file of an adapter folder is for. IGNORED files are allowed, never read and never kept. TOKENIZER files
    are kept, and read by those who serve text alone."""

    CONFIG = "config"
    TENSORS = "tensors"
    TOKENIZER = "tokenizer"
    IGNORED = "ignored"


@dataclass(frozen=True, slots=True)
class CheckedFolder:
    """A folder that passed: its config, and where each tensor lies. ``files`` are the served ones, sorted by name."""

    path: Path
    family: str
    config: Mapping[str, JsonValue]
    tensors: Mapping[str, TensorInfo]
    files: tuple[Path, ...]


def file_role(name: str) -> FileRole:
    """What a file of this name is for. Raises AdapterRejected for every name that is not allowed."""
    if name == CONFIG_FILE:
        return FileRole.CONFIG
    if reason := _REFUSED_FILES.get(name):
        raise AdapterRejected(f"{name!r} is refused: {reason}.", param="files")
    if _TENSOR_FILE.fullmatch(name):
        return FileRole.TENSORS
    if name in TOKENIZER_FILES:
        return FileRole.TOKENIZER
    if name in IGNORED_FILES:
        return FileRole.IGNORED
    shown = repr(name[:100])
    if name.lower().endswith(_PICKLES):
        raise AdapterRejected(
            f"{shown} is a pickle, which can run code when it is loaded: convert it to safetensors with "
            "`onebase adapters convert SOURCE TARGET` (or save_pretrained of a current peft) and leave it out.",
            param="files",
        )
    raise AdapterRejected(
        f"{shown} is not a file of an adapter: {CONFIG_FILE}, *.safetensors and {', '.join(TOKENIZER_FILES)} are "
        f"served, {', '.join(IGNORED_FILES)} are ignored.",
        param="files",
    )


def most_bytes(name: str) -> int | None:
    """Of a file with a bound of its own; None where only the sum is bounded."""
    return MAX_CONFIG_BYTES if name == CONFIG_FILE else TOKENIZER_FILES.get(name)


def check_folder(path: Path) -> CheckedFolder:
    """All checks of structure, none of values: see check_finite. Raises AdapterRejected or AdapterTooLarge."""
    files = served_files(path)
    config = read_config(path / CONFIG_FILE)
    return CheckedFolder(path, family_of(config, CONFIG_FILE), config, _all_tensors(files), files)


def served_files(path: Path) -> tuple[Path, ...]:
    """The config, the tensor files and those of a tokenizer, sorted by name.

    Every other entry has to be a harmless, known one.
    """
    entries = sorted(path.iterdir())
    if len(entries) > MAX_FILES:
        raise AdapterTooLarge(f"The folder has {len(entries)} entries; at most {MAX_FILES} are allowed.", param="files")
    for entry in entries:
        if entry.is_symlink():
            raise AdapterRejected(f"{entry.name!r} is a symbolic link; links are not followed.", param="files")
    files = tuple(entry for entry in entries if file_role(entry.name) is not FileRole.IGNORED)
    for file in files:
        if not stat.S_ISREG(file.lstat().st_mode):
            raise AdapterRejected(f"{file.name!r} is not a regular file.", param="files")
    roles = {file_role(file.name) for file in files}
    if not roles >= {FileRole.CONFIG, FileRole.TENSORS}:
        missing = CONFIG_FILE if FileRole.CONFIG not in roles else "adapter_model.safetensors"
        raise AdapterRejected(f"The folder has no {missing}.", param="files")
    return files


def read_config(path: Path) -> dict[str, JsonValue]:
    """adapter_config.json as an object. Raises AdapterRejected, or AdapterTooLarge over 1 MiB."""
    with path.open("rb") as file:
        raw = file.read(MAX_CONFIG_BYTES + 1)
    if len(raw) > MAX_CONFIG_BYTES:
        raise AdapterTooLarge(f"{CONFIG_FILE} is over {MAX_CONFIG_BYTES} bytes.", param=CONFIG_FILE)
    try:
        config = parse_strict(raw.decode("utf-8"))
    except UnicodeDecodeError:
        raise AdapterRejected(f"{CONFIG_FILE} is refused: it is not UTF-8.", param=CONFIG_FILE) from None
    except JsonError as error:
        raise AdapterRejected(f"{CONFIG_FILE} is refused: {error}.", param=CONFIG_FILE) from None
    if not isinstance(config, dict):
        raise AdapterRejected(f"{CONFIG_FILE} is refused: it is not a JSON object.", param=CONFIG_FILE)
    return config


def check_finite(folder: CheckedFolder) -> None:
    """Stream every floating tensor, CHUNK_BYTES at a time. Raises AdapterRejected naming the first NaN or Inf."""
    for file in folder.files:
        mine = {key: info for key, info in folder.tensors.items() if info.file == file}
        if mine:
            with file.open("rb") as stream:
                for key, info in mine.items():
                    _check_tensor_finite(stream, key, info)


def ensure_finite(key: str, tensor: Tensor) -> None:
    """Raises AdapterRejected where a floating tensor has NaN or Inf."""
    if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
        raise AdapterRejected(f"The tensor {key!r} has NaN or infinite values.", param=key)


def read_values(stream: BufferedReader, info: TensorInfo, start: int, nbytes: int) -> Tensor:
    """Elements of a tensor as a flat tensor of its dtype: ``nbytes`` of them from byte ``start`` of the tensor on."""
    buffer = torch.empty(nbytes, dtype=torch.uint8)
    stream.seek(info.offset + start)
    if nbytes and stream.readinto(buffer.numpy().data) != nbytes:
        raise AdapterRejected(f"{info.file.name} became shorter while it was read.", param=info.file.name)
    return buffer.view(info.dtype)


def _check_tensor_finite(stream: BufferedReader, key: str, info: TensorInfo) -> None:
    if not info.dtype.is_floating_point:
        return
    for start in range(0, info.nbytes, CHUNK_BYTES):
        ensure_finite(key, read_values(stream, info, start, min(CHUNK_BYTES, info.nbytes - start)))


def _all_tensors(files: tuple[Path, ...]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        if file_role(file.name) is not FileRole.TENSORS:
            continue
        for key, info in read_header(file, MAX_TENSORS - len(tensors)).items():
            if key in tensors:
                raise AdapterRejected(f"The tensor {key!r} is in two files: {file.name} has it again.", param=key)
            tensors[key] = info
    return tensors

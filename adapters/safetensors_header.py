"""The safetensors header, read by hand: what a stranger's file claims is checked before anything trusts it.

Layout: 8 bytes little-endian header length N, N bytes of JSON, then the buffer. The JSON maps a tensor's name to
``{"dtype", "shape", "data_offsets": [begin, end]}`` with offsets into the buffer; the tensors tile the buffer without
holes. ``__metadata__`` maps strings to strings.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from onebase.adapters.errors import AdapterRejected, AdapterTooLarge
from onebase.adapters.strict_json import JsonError, JsonValue, parse_any_depth

MAX_HEADER_BYTES = 32 << 20
MAX_TENSORS = 100_000
MAX_DIMENSIONS = 8
MAX_METADATA_CHARS = 1 << 20

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
}

_SPACE = re.compile(r"[ \t\n\r]*")
_KEY = re.compile(r'"((?:[^"\\\x00-\x1f]|\\.){0,1024})"[ \t\n\r]*:[ \t\n\r]*')
_FIELDS = {"dtype", "shape", "data_offsets"}
_ENTRY_CHARS = 512
_TOO_LARGE = 1 << 63


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies. ``offset`` counts from the start of the file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_header(path: Path, limit: int = MAX_TENSORS) -> dict[str, TensorInfo]:
    """Every tensor of the file, in the file's order; ``limit`` of them at most.

    Work and memory are bounded by the header's length, whatever it claims. Raises AdapterRejected, or AdapterTooLarge
    for a header or a number of tensors over the limit; the message names the file and the key.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = _header_length(path.name, file.read(8), size)
        raw = file.read(length)
    if len(raw) != length:
        raise _bad(path.name, "it is truncated inside its header")
    _check_count(path.name, raw.count(b'"data_offsets"'), limit)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise _bad(path.name, "its header is not UTF-8") from None
    del raw
    tensors = {key: _tensor(path, path.name, key, value, 8 + length) for key, value in _entries(path.name, text, limit)}
    _check_tiling(path.name, tensors, 8 + length, size)
    return tensors


def _header_length(name: str, prefix: bytes, size: int) -> int:
    if len(prefix) < 8:
        raise _bad(name, f"it has {size} bytes; a safetensors file has at least 10")
    length: int = struct.unpack("<Q", prefix)[0]
    if length > size - 8:
        raise _bad(name, f"it is truncated, or lies: it claims a header of {length} bytes in a file of {size}")
    if length > MAX_HEADER_BYTES:
        raise AdapterTooLarge(f"{name}: the header has {length} bytes; the limit is {MAX_HEADER_BYTES}.", param=name)
    return length


def _check_count(name: str, tensors: int, limit: int) -> None:
    if tensors > limit:
        raise AdapterTooLarge(f"{name}: more than {MAX_TENSORS} tensors, with those of other files.", param=name)


def _entries(name: str, text: str, limit: int) -> Iterator[tuple[str, JsonValue]]:
    """Name and value of each tensor, one at a time, so that a hostile header never becomes one big object."""
    if not text.startswith("{"):
        raise _bad(name, "its header is not a JSON object")
    seen: set[str] = set()
    at = _skip(text, 1)
    while not (at < len(text) and text[at] == "}" and not seen):
        key, at = _key(name, text, at)
        if key in seen:
            raise _bad(name, f"the key {key!r} appears twice in its header")
        seen.add(key)
        _check_count(name, len(seen) - ("__metadata__" in seen), limit)
        value, at = _value(name, text, at, key)
        if key != "__metadata__":
            yield key, value
        at = _skip(text, at)
        if text[at : at + 1] != ",":
            break
        at = _skip(text, at + 1)
    if text[at : at + 1] != "}" or _skip(text, at + 1) != len(text):
        raise _bad(name, "its header is not one valid JSON object")


def _skip(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at


def _key(name: str, text: str, at: int) -> tuple[str, int]:
    match = _KEY.match(text, at)
    if match is None:
        raise _bad(name, "its header is not valid JSON, or a tensor's name is over 1,024 characters")
    key: str = match.group(1)
    if "\\" in key:
        try:
            key = json.loads(f'"{key}"')
        except ValueError:
            raise _bad(name, "a tensor's name in its header is not a valid JSON string") from None
    if not key or not key.isprintable():
        raise _bad(name, f"the tensor name {key[:100]!r} is empty or has unprintable characters")
    return key, match.end()


def _value(name: str, text: str, at: int, key: str) -> tuple[JsonValue, int]:
    if key == "__metadata__":
        return None, _metadata_end(name, text[at : at + MAX_METADATA_CHARS], at)
    end = text.find("}", at, at + _ENTRY_CHARS) + 1
    if end == 0:
        raise _bad(name, f"the header entry of {key!r} is not an object of at most {_ENTRY_CHARS} characters")
    try:
        return parse_any_depth(text[at:end]), end
    except JsonError as error:
        raise _bad(name, f"the header entry of {key!r} is wrong: {error}") from None


def _metadata_end(name: str, window: str, at: int) -> int:
    """Metadata is not used; it has to be an object of strings, and the index behind it is returned."""
    try:
        pairs, length = json.JSONDecoder(object_pairs_hook=tuple).raw_decode(window)
    except (ValueError, RecursionError):
        raise _bad(name, f"__metadata__ is not valid JSON of at most {MAX_METADATA_CHARS} characters") from None
    if not window.startswith("{") or not all(isinstance(value, str) for _, value in pairs):
        raise _bad(name, "__metadata__ must map strings to strings")
    if len({key for key, _ in pairs}) != len(pairs):
        raise _bad(name, "__metadata__ has a key twice")
    return at + length


def _tensor(path: Path, name: str, key: str, value: JsonValue, start: int) -> TensorInfo:
    if not isinstance(value, dict) or set(value) != _FIELDS:
        raise _bad(name, f"the header entry of {key!r} must have exactly dtype, shape and data_offsets")
    dtype = DTYPES.get(value["dtype"]) if isinstance(value["dtype"], str) else None
    if dtype is None:
        raise _bad(name, f"the dtype of {key!r} is unknown; known are {', '.join(DTYPES)}")
    shape = _sizes(name, key, "shape", value["shape"])
    offsets = _sizes(name, key, "data_offsets", value["data_offsets"])
    if len(shape) > MAX_DIMENSIONS or len(offsets) != 2:
        raise _bad(name, f"{key!r} must have two data_offsets and at most {MAX_DIMENSIONS} dimensions")
    begin, end = offsets
    needed = dtype.itemsize * math.prod(shape)
    if not needed and math.prod(extent or 1 for extent in shape) >= 1 << 48:
        raise _bad(name, f"{key!r} has no elements and a shape that is out of range")
    if end - begin != needed:
        raise _bad(name, f"{key!r} lies about its size: shape and dtype take {needed} bytes, not {end - begin}")
    return TensorInfo(path, dtype, shape, start + begin, needed)


def _sizes(name: str, key: str, field: str, value: JsonValue) -> tuple[int, ...]:
    """A list of integers in [0, 2**63): bools and floats are not integers."""
    if not isinstance(value, list):
        raise _bad(name, f"the {field} of {key!r} must be a list")
    sizes: list[int] = []
    for item in value:
        if type(item) is not int or not 0 <= item < _TOO_LARGE:
            raise _bad(name, f"the {field} of {key!r} must hold non-negative integers below 2**63")
        sizes.append(item)
    return tuple(sizes)


def _check_tiling(name: str, tensors: dict[str, TensorInfo], start: int, size: int) -> None:
    at = start
    for key, info in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if info.offset != at:
            raise _bad(name, f"the data_offsets of {key!r} leave a hole or overlap with another tensor")
        at += info.nbytes
        if at > size:
            raise _bad(name, f"{key!r} ends {at - size} bytes behind the end of the file: truncated, or a lie")
    if at != size:
        raise _bad(name, f"{size - at} bytes at its end belong to no tensor")


def _bad(name: str, what: str) -> AdapterRejected:
    return AdapterRejected(f"{name} is refused: {what}.", param=name)

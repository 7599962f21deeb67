"""What a hostile or odd folder may have: every field of its config and every kind of tensor, replaced or removed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
# Which modules were adapted: docs/decisions.md says that the tensors tell, and that these fields are not asked again.
# The others are about files and libraries; a hostile one among them makes PEFT look elsewhere.
UNASKED = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "exclude_modules",
        "layers_pattern",
        "layers_to_transform",
        "peft_version",
        "revision",
        "target_modules",
        "target_parameters",
        "task_type",
    }
)
VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    -1,
    0,
    1,
    2,
    0.5,
    1e308,
    10**30,
    "NaN",
    "",
    [0],
    [[1], {"a": 2}],
    {},
    {"q_proj": 2},
    {"a": {"b": [None, -1]}},
)
Change = Callable[[Tensor], Tensor]
CHANGES: dict[str, Change] = {
    "transposed": lambda tensor: tensor.mT.contiguous() if tensor.dim() > 1 else tensor[None],
    "emptied": lambda tensor: tensor[:0].clone(),
    "rank+1": lambda tensor: torch.cat((tensor, tensor[:1])),
    "lifted": lambda tensor: tensor[None].clone(),
    "bfloat16": lambda tensor: tensor.bfloat16(),
    "float64": lambda tensor: tensor.double(),
    "int64": lambda tensor: tensor.long(),
    "bool": lambda tensor: tensor.bool(),
    "negative": lambda tensor: -tensor - 1,
    "large": lambda tensor: torch.full_like(tensor, 60),
    "nan": lambda tensor: tensor.float() * float("nan"),
}


@dataclass(frozen=True)
class Edit:
    """name says what was done, for the failure's message."""

    name: str
    config: dict[str, Any]
    tensors: dict[str, Tensor]

    def write(self, folder: Path) -> None:
        """The folder must not exist, or be an edit's."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / CONFIG).write_text(json.dumps(self.config))
        save_file(self.tensors, folder / TENSORS)


def edits(adapter: Path) -> Iterator[Edit]:
    """Every edit of an adapter folder, in an order that does not change."""
    config, tensors = json.loads((adapter / CONFIG).read_text()), load_file(adapter / TENSORS)
    for name in sorted(config.keys() - UNASKED):
        yield Edit(f"{name} removed", {key: value for key, value in config.items() if key != name}, tensors)
        for value in _others(config[name]):
            yield Edit(f"{name} = {value!r}", config | {name: value}, tensors)
    for key in _examples(tensors):
        rest = {other: tensor for other, tensor in tensors.items() if other != key}
        yield Edit(f"{key} removed", config, rest)
        yield Edit(f"{key} renamed", config, rest | {key + "s": tensors[key]})
        yield Edit(f"{key} named twice", config, tensors | {key.removeprefix("base_model."): tensors[key].clone()})
        for name, change in CHANGES.items():
            yield Edit(f"{key} {name}", config, rest | {key: change(tensors[key])})


def _others(value: Any) -> Iterator[Any]:
    """What a field is replaced by: also neighbours of a number, and the entries of an object in the same way."""
    yield from (other for other in VALUES if repr(other) != repr(value))
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield from (value + 1, value * 2, float(value) + 0.5, float(value))
    if isinstance(value, dict):
        for name in list(value)[:2]:
            yield {key: item for key, item in value.items() if key != name}
            yield from (value | {name: other} for other in VALUES)


def _examples(tensors: dict[str, Tensor]) -> list[str]:
    """One key for each ending of a name, so that every kind of tensor is there once."""
    endings: dict[tuple[str, ...], str] = {}
    for key in sorted(tensors):
        parts = key.split(".")
        endings.setdefault(tuple(parts[-2:] if parts[-1] in ("weight", "bias") else parts[-1:]), key)
    return list(endings.values())

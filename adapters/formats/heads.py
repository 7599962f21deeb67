"""Classification heads: what PEFT saves for the task types SEQ_CLS and TOKEN_CLS.

The head is a linear module of the classifier that the adapter was trained in; the served base has none. PEFT's config
has no names of labels.
"""

from __future__ import annotations

from torch import Tensor

from onebase.adapters.base import BaseModel
from onebase.adapters.errors import AdapterRejected
from onebase.adapters.formats.files import AdapterFiles
from onebase.adapters.formats.keys import check_shape
from onebase.adapters.program import Head

MAX_LABELS = 4096
HEAD_NAMES = ("score", "classifier")  # PEFT adds both to modules_to_save, whichever the classifier has
_TASKS = ("SEQ_CLS", "TOKEN_CLS")
_KEYS = {
    f"{prefix}{name}{saved}.{part}": (name, part)
    for prefix in ("base_model.model.", "base_model.", "")
    for name in HEAD_NAMES
    for saved in ("", ".modules_to_save.default")
    for part in ("weight", "bias")
}
# The width of what the output head reads, by what architectures call it.
_WIDTHS = ("word_embed_proj_dim", "hidden_size", "n_embd")


def take_head(files: AdapterFiles, base: BaseModel) -> Head | None:
    """The head, where the task has one and the file holds it. Raises AdapterRejected naming the key."""
    if files.fields.task_type not in _TASKS:
        return None
    keys: dict[str, str] = {}
    found = {key: _KEYS[key] for key in files.tensors if key in _KEYS}
    for key, (name, part) in found.items():
        if part in keys or name != next(iter(found.values()))[0]:
            raise AdapterRejected(f"{key!r} belongs to a second head; one is served.", param=key)
        keys[part] = key
    if not keys:
        return None
    if "weight" not in keys:
        raise AdapterRejected(f"{keys['bias']!r} is a head's bias, and its weight is missing.", param=keys["bias"])
    weight = _take_weight(keys["weight"], files, base)
    bias = _take_bias(keys.get("bias"), len(weight), files)
    return Head(weight, bias, per_token=files.fields.task_type == "TOKEN_CLS")


def _take_weight(key: str, files: AdapterFiles, base: BaseModel) -> Tensor:
    shape = files.tensors.shape(key)
    width = next((base.config[name] for name in _WIDTHS if base.config.get(name)), None)
    if len(shape) != 2 or not 1 <= shape[0] <= MAX_LABELS or shape[1] != width:
        raise AdapterRejected(
            f"The tensor {key!r} has shape {shape}; a head has 1 to {MAX_LABELS} labels over the base's width {width}.",
            param=key,
        )
    return files.tensors.take(key).float()


def _take_bias(key: str | None, num_labels: int, files: AdapterFiles) -> Tensor | None:
    if key is None:
        return None
    check_shape(key, files.tensors, (num_labels,), "one for each label")
    return files.tensors.take(key).float()

"""Trained rows of single tokens: PEFT's TRAINABLE_TOKENS, and LORA's trainable_token_indices.

A row replaces the base's. Where the output head is tied to the embedding, its rows change with it, unless the head has
rows of its own in the file. Gemma's scaled embeddings scale the new rows too.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from onebase.adapters.base import BaseModel, Site, SiteKind
from onebase.adapters.check import CONFIG_FILE
from onebase.adapters.errors import AdapterRejected
from onebase.adapters.formats.fields import refused
from onebase.adapters.formats.files import AdapterFiles
from onebase.adapters.formats.keys import check_shape, group_by_site
from onebase.adapters.formats.register import Compiled, register
from onebase.adapters.formats.saved import output_rows, with_saved
from onebase.adapters.program import SiteOps
from onebase.adapters.strict_json import JsonValue
from onebase.kernels.ops.tokens import TokenRows

ROWS, ROWS_IN_LORA = "trainable_tokens_delta", "token_adapter.trainable_tokens_delta"
MAX_TOKENS = 1 << 20

IndicesOf = Callable[[str], tuple[str, JsonValue]]


@register(
    "TRAINABLE_TOKENS",
    title="Trainable tokens",
    paper="",
    instructions=("TokenRows", "OutputRows"),
    cost="nothing at an embedding; at a tied head 2nh FLOPs and nh elements for n tokens",
    note="a tied head changes with the embedding, as PEFT has it",
)
def compile_trainable_tokens(files: AdapterFiles, base: BaseModel) -> Compiled:
    """Raises AdapterRejected naming the key or field."""
    files.fields.ignore(("init_weights", "target_modules", "exclude_modules"))
    indices = files.fields.take("token_indices")
    ops = take_token_rows(files, base, ROWS, lambda path: ("token_indices", indices))
    return with_saved(ops, files, base)


def lora_token_rows(files: AdapterFiles, base: BaseModel) -> dict[str, SiteOps]:
    """Take LORA's trainable_token_indices, a list (for the word embedding) or {module: list}, and their tensors."""
    field = "trainable_token_indices"
    value = files.fields.take(field)

    def indices(path: str) -> tuple[str, JsonValue]:
        if not isinstance(value, dict):
            return field, value
        found = [name for name in value if path.endswith(name)]
        if len(found) != 1:
            raise refused(field, value, f"exactly one of its names must be the end of {path}, which has trained rows")
        return f"{field}[{found[0]!r}]", value[found[0]]

    ops = take_token_rows(files, base, ROWS_IN_LORA, indices)
    if value and not ops:
        raise refused(field, value, "the files have no trained rows")
    for name in value if isinstance(value, dict) else ():
        if not any(path.endswith(name) for path in ops):
            raise refused(field, value, f"the files have no trained rows of {name[:100]!r}")
    return ops


def take_token_rows(files: AdapterFiles, base: BaseModel, suffix: str, indices_of: IndicesOf) -> dict[str, SiteOps]:
    """Site path -> its new rows, tied heads included. indices_of: path -> the field's name and what it says."""
    rows: dict[str, tuple[Tensor, Tensor]] = {}
    for path, keys in group_by_site(files.tensors, base, (suffix,)).items():
        name, value = indices_of(path)
        site = base.sites[path]
        index = _check_indices(name, value, _num_tokens(site))
        order = torch.argsort(index)
        rows[path] = index[order], _take_rows(keys[suffix], site, len(index), files)[order]
    _tie(rows, base)
    return {path: _row_ops(base.sites[path], *both, base) for path, both in rows.items()}


def _tie(rows: dict[str, tuple[Tensor, Tensor]], base: BaseModel) -> None:
    """Heads that share an embedding's memory get its rows. Two copies of one tied row must be equal."""
    for path in [path for path in rows if base.sites[path].kind is SiteKind.EMBEDDING]:
        for other in base.tied(path) if base.config.get("tie_word_embeddings") else ():
            index, weight = rows.setdefault(other, rows[path])
            if torch.equal(index, rows[path][0]) and not torch.equal(weight, rows[path][1]):
                raise AdapterRejected(f"{other} is tied to {path}, and their trained rows differ.", param=other)


def _row_ops(site: Site, index: Tensor, weight: Tensor, base: BaseModel) -> SiteOps:
    weight = weight.to(base.weight(site.path).dtype)
    if site.kind is SiteKind.EMBEDDING:
        return SiteOps(extra=(TokenRows(index.int(), weight * site.output_scale),))
    if base.bias(site.path) is not None:
        message = f"{site.path} has a bias, which PEFT leaves out where it trains rows: such a head is not served."
        raise AdapterRejected(message, param=site.path)
    return SiteOps(extra=(output_rows(site, index, weight, base),))


def _num_tokens(site: Site) -> int:
    if site.kind not in (SiteKind.EMBEDDING, SiteKind.LINEAR):
        raise AdapterRejected(f"{site.path} is a {site.kind} of the base, and has no rows of tokens.", param=site.path)
    return site.in_features if site.kind is SiteKind.EMBEDDING else site.out_features


def _take_rows(key: str, site: Site, count: int, files: AdapterFiles) -> Tensor:
    width = site.out_features if site.kind is SiteKind.EMBEDDING else site.in_features
    check_shape(key, files.tensors, (count, width), "a row for each of the config's token indices")
    return files.tensors.take(key)


def _check_indices(name: str, value: JsonValue, num_tokens: int) -> Tensor:
    """int64, as the field has them."""
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_TOKENS:
        raise refused(name, value, f"it must be a list of 1 to {MAX_TOKENS} token indices")
    found = [item for item in value if isinstance(item, int) and not isinstance(item, bool) and 0 <= item < num_tokens]
    if len(set(found)) < len(value):
        raise refused(name, value, f"{CONFIG_FILE} must name distinct tokens of the base's {num_tokens}")
    return torch.tensor(found)

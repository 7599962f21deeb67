"""What PEFT's families of factored deltas have in common: fields that say nothing at inference, tensors by site,
tensors of the whole adapter, ranks by pattern."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor

from onebase.adapters.base import BaseModel, Site, SiteKind
from onebase.adapters.errors import AdapterRejected
from onebase.adapters.formats.fields import MAX_RANK, Fields, refused
from onebase.adapters.formats.files import AdapterFiles, TensorBag
from onebase.adapters.formats.keys import check_shape, group_by_site
from onebase.adapters.formats.patterns import PatternTable

_HARMLESS = (
    "exclude_modules",
    "fan_in_fan_out",
    "init_weights",
    "layers_pattern",
    "layers_to_transform",
    "target_modules",
)
_GLOBAL_PREFIXES = ("base_model.", "base_model.model.", "")


def ignore_training(fields: Fields, *harmless: str) -> None:
    """Take the fields that change nothing at inference; ``harmless``: those of one family."""
    fields.ignore((*_HARMLESS, *harmless))


@dataclass(frozen=True, slots=True)
class SiteTensors:
    """The tensors of one site, by suffix."""

    site: Site
    keys: Mapping[str, str]
    bag: TensorBag

    def __contains__(self, suffix: str) -> bool:
        return suffix in self.keys

    def key(self, suffix: str) -> str:
        """Raises AdapterRejected where the tensor is missing."""
        if suffix in self.keys:
            return self.keys[suffix]
        present = next(iter(self.keys.values()))
        raise AdapterRejected(
            f"{self.site.path} ({self.site.kind}) needs a tensor {suffix!r}, and has only {present!r} and its like: "
            "half an adapter is refused.",
            param=present,
        )

    def shape(self, suffix: str) -> tuple[int, ...]:
        return self.bag.shape(self.key(suffix))

    def take(self, suffix: str, shape: tuple[int, ...], meaning: str) -> Tensor:
        """The tensor in float32. Raises AdapterRejected unless it has the shape; ``meaning``: where that is from."""
        key = self.key(suffix)
        check_shape(key, self.bag, shape, meaning)
        return self.bag.take(key).float()


def sites_with(
    files: AdapterFiles,
    base: BaseModel,
    suffixes: Collection[str],
    kinds: Collection[SiteKind] = (SiteKind.LINEAR,),
) -> list[SiteTensors]:
    """The sites that have any of the suffixes, in the order of the model's modules.

    Raises AdapterRejected for a site of another kind.
    """
    found = group_by_site(files.tensors, base, suffixes)
    groups = [SiteTensors(site, found[path], files.tensors) for path, site in base.sites.items() if found.get(path)]
    for group in groups:
        if group.site.kind not in kinds:
            key = next(iter(group.keys.values()))
            allowed = " and ".join(kinds)
            message = (
                f"The tensor {key!r} adapts a {group.site.kind} of the base; this family adapts {allowed} modules."
            )
            raise AdapterRejected(message, param=key)
    return groups


def global_key(tensors: TensorBag, name: str) -> str | None:
    """The key of a tensor that belongs to the whole adapter (``base_model.<name>``), if the file has it."""
    spellings = {f"{prefix}{name}{suffix}" for prefix in _GLOBAL_PREFIXES for suffix in ("", ".default")}
    return next((key for key in tensors if key in spellings), None)


def take_global(tensors: TensorBag, name: str, shape: tuple[int, ...], meaning: str) -> Tensor:
    """A tensor of the whole adapter, float32. Raises AdapterRejected where it is missing or has another shape."""
    key = global_key(tensors, name)
    if key is None:
        raise AdapterRejected(
            f"The adapter needs a tensor 'base_model.{name}': half an adapter is refused.", param=name
        )
    check_shape(key, tensors, shape, meaning)
    return tensors.take(key).float()


@dataclass(frozen=True, slots=True)
class ByPattern:
    """A number of the config with exceptions by module."""

    default: float
    table: PatternTable

    def at(self, path: str) -> float:
        found = self.table.find(path)
        return self.default if found is None else found


@dataclass(frozen=True, slots=True)
class Ranks:
    """r and rank_pattern."""

    r: int
    table: PatternTable

    def at(self, path: str) -> int:
        found = self.table.find(path)
        return self.r if found is None else int(found)


def read_ranks(fields: Fields) -> Ranks:
    """Raises AdapterRejected unless every rank is an integer from 1 to MAX_RANK."""
    table = fields.numbers("rank_pattern")
    for key, rank in table.items():
        if not rank.is_integer() or not 1 <= rank <= MAX_RANK:
            raise refused("rank_pattern", {key: rank}, f"ranks are integers from 1 to {MAX_RANK}")
    return Ranks(fields.integer("r", 1, MAX_RANK), PatternTable("rank_pattern", table))


def read_alphas(fields: Fields) -> ByPattern:
    """alpha and alpha_pattern."""
    return ByPattern(fields.number("alpha"), PatternTable("alpha_pattern", fields.numbers("alpha_pattern")))

"""`onebase check`: compiles an adapter offline against a base and says what it would cost, or why it is refused.

Nothing is served: the base is loaded and probed as for serving, the adapter compiled and laid out as for the device.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from onebase.adapters.base import BaseModel, SiteKind
from onebase.adapters.errors import AdapterError, AdapterRejected
from onebase.adapters.formats import compile_folder
from onebase.adapters.packing import pack
from onebase.adapters.program import AdapterProgram, SiteOps
from onebase.adapters.tiers.arena import BLOCK_ALIGN, aligned
from onebase.serve.model.loader import LoadedModel

_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class AdapterReport:
    """What an adapter is on a base.

    sites: kind -> number of sites; modules: last part of their paths -> number; instructions: name -> number.
    rank_mean: over the sites that have a rank. own_bytes, shared_bytes: in the arena, in the base's dtype; the shared
    ones are held once for all adapters that have them. flops, base_flops: for one token, in matrix products and the
    adapter's own instructions; attention's reads of the sequence are not among them.
    """

    family: str
    sites: Mapping[str, int]
    modules: Mapping[str, int]
    instructions: Mapping[str, int]
    rank_max: int
    rank_mean: float
    elements: int
    own_bytes: int
    shared_bytes: int
    flops: int
    base_flops: int
    scalable: bool
    num_virtual_tokens: int
    invocation: tuple[int, ...]
    num_labels: int

    @property
    def share(self) -> float:
        """The adapter's flops as a share of the base's."""
        return self.flops / self.base_flops if self.base_flops else 0.0

    def to_dict(self) -> dict[str, object]:
        return {**dataclasses.asdict(self), "flops_share": self.share}

    def text(self) -> str:
        """A line for each thing, for people."""
        rows = {
            "family": self.family,
            "sites": f"{sum(self.sites.values())} ({_counts(self.sites)})",
            "modules": _counts(self.modules),
            "instructions": _counts(self.instructions),
            "rank": f"{self.rank_max} at most, {self.rank_mean:.1f} on average",
            "elements": f"{self.elements:,}",
            "device memory": f"{self.own_bytes / _MIB:.2f} MiB of its own, {self.shared_bytes / _MIB:.2f} MiB shared",
            "cost per token": f"{self.flops:,} FLOPs, {self.share:.2%} of the base's {self.base_flops:,}",
            "scales": "any" if self.scalable else "0 and 1 only",
            "virtual tokens": str(self.num_virtual_tokens),
            "activated by": " ".join(map(str, self.invocation)) or "every token",
            "labels": str(self.num_labels or "no head"),
        }
        return "\n".join(f"{name + ':':<16} {value or '-'}" for name, value in rows.items())


def check_adapter(path: Path, base: LoadedModel) -> AdapterReport:
    """Compile the folder for the base. Raises AdapterError where it would be refused."""
    try:
        program = compile_folder(path, base, digest="")
    except AdapterError:
        raise
    except Exception as error:  # as the engine does: a hostile file is refused, whatever a library makes of it
        raise AdapterRejected(f"the adapter cannot be read: {type(error).__name__}: {error}", param="path") from error
    packed = pack(program, base.dtype)
    size = base.dtype.itemsize
    ranks = [ops.rank for ops in program.ops.values() if ops.rank]
    return AdapterReport(
        family=program.family,
        sites=_sorted(Counter(str(base.sites[path].kind) for path in program.ops)),
        modules=_sorted(Counter(path.rpartition(".")[2] for path in program.ops)),
        instructions=_sorted(Counter(name for ops in program.ops.values() for name in _names(ops))),
        rank_max=program.rank,
        rank_mean=sum(ranks) / len(ranks) if ranks else 0.0,
        elements=program.num_elements,
        own_bytes=aligned(packed.data.numel(), BLOCK_ALIGN) * size,
        shared_bytes=sum(aligned(part.numel(), BLOCK_ALIGN) for part in packed.shared.values()) * size,
        flops=program_flops(program, base),
        base_flops=base_flops(base),
        scalable=program.scalable,
        num_virtual_tokens=program.num_virtual_tokens,
        invocation=program.invocation,
        num_labels=len(program.head.weight) if program.head is not None else 0,
    )


def program_flops(program: AdapterProgram, base: BaseModel) -> int:
    """For one token that every site sees; a multiplication with an addition counts two."""
    return sum(_site_flops(ops, path, base) for path, ops in program.ops.items())


def base_flops(base: BaseModel) -> int:
    """For one token: its products with the weights of linear sites, of routers and of the experts that it takes."""
    kinds = (SiteKind.LINEAR, SiteKind.ROUTER)
    linear = sum(site.in_features * site.out_features for site in base.sites.values() if site.kind in kinds)
    routed = sum(
        experts.per_token * part.in_features * part.out_features
        for experts in base.experts.values()
        for part in (experts.up, experts.down)
    )
    return 2 * (linear + routed)


def _site_flops(ops: SiteOps, path: str, base: BaseModel) -> int:
    site = base.sites[path]
    flops = sum(op.flops for op in ops.extra)
    if ops.low_rank is not None:
        flops += 2 * ops.low_rank.rank * (site.in_features + site.out_features)
    if ops.token_low_rank is not None:
        flops += 2 * ops.token_low_rank.rank * site.out_features
    return flops if ops.add_out is None else flops + site.out_features


def _names(ops: SiteOps) -> Iterator[str]:
    fast = {"LowRank": ops.low_rank, "TokenLowRank": ops.token_low_rank, "AddOut": ops.add_out}
    yield from (name for name, op in fast.items() if op is not None)
    yield from (type(op).__name__ for op in ops.extra)


def _sorted(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items()))


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())

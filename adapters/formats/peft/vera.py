"""PEFT's VERA and PVERA. Kopiczko et al., "VeRA" (2310.11454); "PVeRA" (2512.07703).

``y += lambda_b * (B (lambda_d * (A x)))`` over one pair of frozen random matrices A and B, cut to a module's size. The
pair is the same for every adapter of one seed and size, so the device holds it once. PVeRA's A and lambda_d have twice
the rows: the mean, which is what inference uses, and a log-variance, which only sampling would.
"""

from __future__ import annotations

from onebase.adapters.base import BaseModel
from onebase.adapters.formats.fields import MAX_RANK, Fields
from onebase.adapters.formats.files import AdapterFiles
from onebase.adapters.formats.projections import projections, read_seed, shared_low_rank
from onebase.adapters.formats.register import Compiled, register
from onebase.adapters.formats.saved import Beside, with_saved
from onebase.adapters.formats.targets import ignore_training, sites_with

_NOTE = "projections saved, or drawn again from projection_prng_key; held once for all adapters that have equal ones"


@register(
    "VERA",
    title="VeRA",
    paper="2310.11454",
    covers=("VeRA",),
    instructions=("SharedLowRank",),
    cost="4hr FLOPs, h + r elements beside the shared 2hr",
    note=_NOTE,
)
def compile_vera(files: AdapterFiles, base: BaseModel) -> Compiled:
    """Raises AdapterRejected naming the key or field."""
    ignore_training(files.fields, "d_initial", "vera_dropout")
    return _compile(files, base, "vera", 1)


@register(
    "PVERA",
    title="PVeRA",
    paper="2512.07703",
    covers=("PVeRA",),
    instructions=("SharedLowRank",),
    cost="4hr FLOPs, h + r elements beside the shared 2hr",
    note=f"the mean; sample_at_inference is refused; {_NOTE}",
)
def compile_pvera(files: AdapterFiles, base: BaseModel) -> Compiled:
    """Raises AdapterRejected naming the key or field."""
    fields = files.fields
    ignore_training(fields, "d_initial", "generator_seed", "pvera_dropout")
    fields.must_be_unset({"sample_at_inference": "its answers would be random: only the mean is served"})
    return _compile(files, base, "pvera", 2)


def _compile(files: AdapterFiles, base: BaseModel, prefix: str, parts: int) -> Compiled:
    rank, saved, seed = _read(files.fields)
    sites = sites_with(files, base, (f"{prefix}_lambda_b", f"{prefix}_lambda_d"))
    if not sites:
        return with_saved({}, files, base)
    a, b = projections(files, sites, prefix, parts * rank, rank, seed, saved=saved)
    return with_saved(shared_low_rank(sites, a[:rank], b, prefix, parts * rank), files, base, Beside(weight=True))


def _read(fields: Fields) -> tuple[int, bool, int]:
    return (
        fields.integer("r", 1, MAX_RANK),
        fields.flag("save_projection", default=True),
        read_seed(fields, "projection_prng_key", 0),
    )

"""PEFT's BEFT. "BEFT: Bias-Efficient Fine-Tuning" (2509.15974): a bias is added to linear modules, by default to v."""

from __future__ import annotations

from onebase.adapters.base import BaseModel, SiteKind
from onebase.adapters.errors import AdapterRejected
from onebase.adapters.formats.files import AdapterFiles
from onebase.adapters.formats.keys import check_shape, group_by_site
from onebase.adapters.formats.register import Compiled, register
from onebase.adapters.formats.saved import Beside, with_saved
from onebase.adapters.program import SiteOps

_BIAS = "beft_bias"


@register(
    "BEFT",
    title="BEFT",
    paper="2509.15974",
    covers=("BitFit",),
    instructions=("AddOut",),
    cost="h FLOPs, h elements",
)
def compile_beft(files: AdapterFiles, base: BaseModel) -> Compiled:
    """Raises AdapterRejected naming the key."""
    files.fields.ignore(("exclude_modules", "init_weights", "target_modules"))
    ops: dict[str, SiteOps] = {}
    for path, keys in group_by_site(files.tensors, base, (_BIAS,)).items():
        site = base.sites[path]
        if site.kind is not SiteKind.LINEAR:
            raise AdapterRejected(f"{path} is a {site.kind} of the base: BEFT adapts linear modules.", param=path)
        check_shape(keys[_BIAS], files.tensors, (1, site.out_features), "out_features")
        ops[path] = SiteOps(add_out=files.tensors.take(keys[_BIAS]).float().flatten())
    return with_saved(ops, files, base, Beside(weight=True))

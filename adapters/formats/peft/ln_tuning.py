"""PEFT's LN_TUNING. Zhao et al., "Tuning LayerNorm in Attention" (2312.11420): norms with parameters of their own.

PEFT copies whatever module it targets, so a linear module or an embedding is possible too.
"""

from __future__ import annotations

from onebase.adapters.base import BaseModel
from onebase.adapters.formats.files import AdapterFiles
from onebase.adapters.formats.keys import group_by_site
from onebase.adapters.formats.register import Compiled, register
from onebase.adapters.formats.saved import Beside, replaced, take_copies, with_saved
from onebase.adapters.program import SiteOps

_COPY = "ln_tuning_layers."


@register(
    "LN_TUNING",
    title="LayerNorm tuning",
    paper="2312.11420",
    instructions=("NormOverride",),
    cost="the norm once more for its rows, 2h elements",
)
def compile_ln_tuning(files: AdapterFiles, base: BaseModel) -> Compiled:
    """Raises AdapterRejected naming the key."""
    files.fields.ignore(("exclude_modules", "target_modules"))
    ops: dict[str, SiteOps] = {}
    for path, keys in group_by_site(files.tensors, base, (_COPY + "weight", _COPY + "bias")).items():
        site = base.sites[path]
        named = {suffix.removeprefix(_COPY): key for suffix, key in keys.items()}
        ops[path] = replaced(site, take_copies(site, named, files.tensors, base), base)
    return with_saved(ops, files, base, Beside(bias=False))

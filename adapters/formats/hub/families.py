"""The formats of AdapterHub's adapters library (Poth et al., 2311.11077): ``adapter_config.json`` and safetensors.

The architecture of the config says which family; a union holds several (MAM, He et al., 2110.04366). A saved head is
accepted where it is the base's own.
"""

from __future__ import annotations

import re

from onebase.adapters.base import BaseModel
from onebase.adapters.errors import AdapterRejected
from onebase.adapters.family_names import HUB_FAMILIES
from onebase.adapters.formats.fields import Fields, refused
from onebase.adapters.formats.files import AdapterFiles
from onebase.adapters.formats.hub.bottleneck import compile_bottlenecks, read_bottleneck
from onebase.adapters.formats.hub.keys import HubFile
from onebase.adapters.formats.hub.lora import compile_lora, read_lora
from onebase.adapters.formats.hub.prefix import compile_prefix, read_prefix
from onebase.adapters.formats.hub.reft import compile_reft, read_reft
from onebase.adapters.formats.keys import take_base_copy
from onebase.adapters.formats.register import Compiled, register
from onebase.adapters.program import SiteOps
from onebase.adapters.strict_json import JsonValue

MAX_UNION = 8
_IN_UNION = "it is not served in a union; adapters of their own may be on one request together"
_HARMLESS = ("config_id", "hidden_size", "model_class", "model_name", "model_type", "type")
_NAME = re.compile(r"[^.]{1,200}")
_VERSION = re.compile(r"adapters\.(\d{1,4})\.(\d{1,4})\b.*")


@register(
    "AH_BOTTLENECK",
    title="AdapterHub bottlenecks",
    paper="2311.11077",
    covers=("Sequential Adapter", "Residual Adapter", "Adapter", "Parallel Adapter", "AdapterPlus", "Compacter"),
    instructions=("BlockBottleneck",),
    cost="4hr FLOPs, 2hr elements a block",
    note="seq_bn, double_seq_bn, par_bn, AdapterPlus, Compacter (expanded at load), on Llama, Mistral and GPT-2",
)
@register(
    "AH_LORA",
    title="AdapterHub LoRA, (IA)3 and VeRA",
    paper="2311.11077",
    covers=("LoRA", "(IA)3"),
    instructions=("LowRank", "ScaleOut"),
    cost="4hr FLOPs, 2hr elements; (IA)3: h",
    note="files of versions below 1.1.0 have alpha = r, as the library reads them",
)
@register(
    "AH_PREFIX_TUNING",
    title="AdapterHub prefix tuning",
    paper="2101.00190",
    covers=("Prefix-tuning",),
    instructions=("KvPrefix",),
    cost="4Th FLOPs a layer",
    note="flat or behind its network; Llama and GPT-2 with as many key heads as query heads; positions start at 0",
)
@register(
    "AH_REFT",
    title="AdapterHub LoReFT, NoReFT and DiReFT",
    paper="2404.03592",
    covers=("ReFT",),
    instructions=("Intervention",),
    cost="4hr FLOPs at the output of a layer, on the prompt's first and last tokens only; 2hr elements",
    note="acts on no generated token; the library does not save DiReFT's subtract_projection and reads such a file as "
    "NoReFT, and so does the server: add the field (false) to serve it as trained",
)
@register(
    "AH_UNION",
    title="AdapterHub unions",
    paper="2110.04366",
    covers=("MAM Adapter",),
    instructions=("BlockBottleneck", "LowRank", "ScaleOut", "KvPrefix"),
    cost="the sum of its parts",
    note="gated unions (UniPELT) are refused: their gates average over the whole sequence",
)
def compile_hub(files: AdapterFiles, base: BaseModel) -> Compiled:
    """Raises AdapterRejected naming the key or field."""
    version = files.fields.take("version")
    files.fields.ignore(_HARMLESS)
    file = HubFile(_read_name(files.fields), files.tensors, base)
    _take_head(file)
    config = files.fields.section("config")
    parts = _parts(config, files.family)
    compiled = (
        _compile_reft(file, config) if files.family == HUB_FAMILIES["reft"] else _compile_parts(file, parts, version)
    )
    for part in parts:
        part.finish()
    config.finish()
    return compiled


def _read_name(fields: Fields) -> str:
    name = fields.take("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise refused("name", name, "it must be the adapter's name, as it stands in the tensors' keys, without dots")
    return name


def _is_before_1_1(version: JsonValue) -> bool:
    match = _VERSION.fullmatch(version) if isinstance(version, str) else None
    return match is not None and (int(match[1]), int(match[2])) < (1, 1)


def _take_head(file: HubFile) -> None:
    """A saved language-model head: the library keeps one beside every adapter, trained or not."""
    for key in file.tensors:
        if key == "lm_head.weight" and "lm_head" in file.base.sites:
            take_base_copy(key, file.tensors, file.base, "lm_head")
        elif key.startswith("heads."):
            raise AdapterRejected(f"The tensor {key!r} is a prediction head of AdapterHub's: not served.", param=key)


def _parts(config: Fields, family: str) -> list[Fields]:
    """The configurations of the union, or the one that there is. The architecture is named in each."""
    if family != HUB_FAMILIES["union"]:
        return [config]
    config.take("architecture")
    value = config.take("configs")
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_UNION:
        raise refused("configs", value, f"it must be a list of 1 to {MAX_UNION} configurations")
    nested = [item for item in value if isinstance(item, dict)]
    if len(nested) != len(value):
        raise refused("configs", value, "every one of them must be an object")
    return [Fields(item) for item in nested]


def _compile_reft(file: HubFile, fields: Fields) -> Compiled:
    fields.take("architecture")
    return compile_reft(file, read_reft(fields))


def _compile_parts(file: HubFile, parts: list[Fields], version: JsonValue) -> Compiled:
    bottlenecks, others = [], []
    names = {name for name in HUB_FAMILIES if name not in ("union", "reft")} | {"bottleneck"}
    seen: set[object] = set()
    for fields in parts:
        architecture = fields.choice("architecture", tuple(names), None, _IN_UNION)
        if architecture in (None, "bottleneck"):
            bottlenecks.append(read_bottleneck(fields, old_names=version is None))
            continue
        if architecture in seen:
            raise refused("architecture", architecture, "a union has each of them once, bottlenecks excepted")
        seen.add(architecture)
        if architecture == "lora":
            others.append(Compiled(compile_lora(file, read_lora(fields, alpha_is_r=_is_before_1_1(version)))))
        else:
            others.append(compile_prefix(file, read_prefix(fields)))
    if bottlenecks:
        others.append(Compiled(compile_bottlenecks(file, bottlenecks)))
    return _union(others)


def _union(parts: list[Compiled]) -> Compiled:
    """All of them. Parts of one union meet only at attention modules: a prefix and a bottleneck."""
    ops: dict[str, SiteOps] = {}
    for part in parts:
        for path, new in part.ops.items():
            old = ops.get(path, SiteOps())
            ops[path] = SiteOps(new.low_rank or old.low_rank, extra=(*old.extra, *new.extra))
    return Compiled(ops, num_virtual_tokens=max(part.num_virtual_tokens for part in parts))

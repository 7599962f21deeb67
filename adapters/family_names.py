"""Which family a config names: PEFT's and our own by ``peft_type``, AdapterHub's by the architecture of its config.

Both libraries write ``adapter_config.json``. AdapterHub's families are called AH_... here.
"""

from __future__ import annotations

from collections.abc import Mapping

from onebase.adapters.errors import AdapterRejected
from onebase.adapters.strict_json import JsonValue

HUB_FAMILIES: Mapping[str | None, str] = {
    None: "AH_BOTTLENECK",
    "lora": "AH_LORA",
    "prefix_tuning": "AH_PREFIX_TUNING",
    "reft": "AH_REFT",
    "union": "AH_UNION",
}
HUB_REFUSALS: Mapping[str, str] = {
    "mtl_lora": "it mixes tasks by an id that no request names; average its task matrices into a plain LoRA",
    "prompt_tuning": "the library supports no prompt tuning on decoders; PEFT's PROMPT_TUNING is served",
}


def family_of(config: Mapping[str, JsonValue], file: str) -> str:
    """The family's name in the register. Raises AdapterRejected where the config names none that could be served."""
    if "peft_type" in config:
        family = config["peft_type"]
        if not isinstance(family, str):
            raise AdapterRejected(f"peft_type in {file} must be a string.", param="peft_type")
        return family
    nested = config.get("config")
    if isinstance(nested, dict):
        return _hub_family(nested.get("architecture"), file)
    if "model_class" in config:
        raise AdapterRejected(
            f"{file} was written by AdapterHub's adapters library, and its 'config' is no object: only configurations "
            "written out in full are served.",
            param="config",
        )
    raise AdapterRejected(f"{file} has no peft_type, so nothing says how to read the tensors.", param="peft_type")


def _hub_family(architecture: JsonValue, file: str) -> str:
    known = architecture if isinstance(architecture, str | None) else repr(architecture)
    if known == "bottleneck":
        known = None
    if known in HUB_FAMILIES:
        return HUB_FAMILIES[known]
    served = ", ".join(name or "null" for name in HUB_FAMILIES)
    reason = HUB_REFUSALS.get(known or "", f"served are {served}")
    raise AdapterRejected(f"{file}: AdapterHub's architecture {known!r:.100} is not served: {reason}.", param="config")

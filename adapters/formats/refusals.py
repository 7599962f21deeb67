"""What is known and cannot be served exactly in a shared batch, why, and what to do instead. docs/adapters.md shows it.

A family here answers with its own reason; an option's reason is in the compiler of its family, which names the field.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from onebase.adapters.strict_json import JsonValue


@dataclass(frozen=True, slots=True)
class Refusal:
    """title: what people call it. reason, way_out: full sentences."""

    title: str
    reason: str
    way_out: str


@dataclass(frozen=True, slots=True)
class OptionRefusal(Refusal):
    """An option of a served family. fields: what a config of it has, as an example; the first one is named."""

    family: str
    fields: Mapping[str, JsonValue]


REFUSED_FAMILIES: Mapping[str, Refusal] = {
    "LILY": Refusal(
        "Lily",
        "Its router averages over every token of the batch, so what one request gets would depend on the others in its "
        "batch and on its own future tokens: there is no answer to be equal to.",
        "Train a LoRA of the same rank, or Poly, whose mixture is fixed.",
    ),
    "XLORA": Refusal(
        "X-LoRA",
        "Its gates come from a complete pass over the base and its reference keeps no KV cache, so every token would "
        "cost a whole second forward; and PEFT's own files lack layers of the classifier that their names clash with.",
        "Serve its LoRAs as adapters of their own, with fixed scales on a request.",
    ),
    "SHADOW": Refusal(
        "Shadow",
        "It is a second transformer that runs beside the base, with keys and values of its own; an adapter here is a "
        "set of instructions at the base's modules.",
        "Distil it into a LoRA or a bottleneck adapter.",
    ),
}

REFUSED_OPTIONS: tuple[OptionRefusal, ...] = (
    OptionRefusal(
        "PVeRA with sampling",
        "Two runs of one request would differ: it draws its vectors anew in each forward.",
        "Set sample_at_inference to false; then the mean is served.",
        "PVERA",
        {"sample_at_inference": True},
    ),
    OptionRefusal(
        "LoRA with layer replication",
        "It changes the depth of the base, which is one model for all adapters.",
        "Make the deeper model a base of its own, and serve the adapter there.",
        "LORA",
        {"layer_replication": [[0, 1]]},
    ),
    OptionRefusal(
        "LoRA-GA, not converted",
        "Training started from a shifted base; the file does not hold the shift, and PEFT silently loads it without.",
        "Save with save_pretrained's path_initial_model_for_weight_conversion: a plain LoRA of twice the rank.",
        "LORA",
        {"init_lora_weights": "lora_ga"},
    ),
    OptionRefusal(
        "CorDA, not converted",
        "Training started from a base without its main directions, which depend on the data that were looked at.",
        "Save with save_pretrained's path_initial_model_for_weight_conversion: a plain LoRA of twice the rank.",
        "LORA",
        {"init_lora_weights": "corda"},
    ),
    OptionRefusal(
        "LoftQ, not converted",
        "Training replaced the base's weights by quantised ones, which are another base.",
        "Save that base and serve the adapter over it, or convert the adapter against the original.",
        "LORA",
        {"init_lora_weights": "loftq"},
    ),
    OptionRefusal(
        "Gated adapters (UniPELT)",
        "The gates are means over the whole sequence, so what a token gets would depend on later ones, and on how a "
        "prompt is cut into chunks.",
        "Train without gates: ungated unions, LoRA and bottlenecks are served.",
        "AH_UNION",
        {"use_gating": True},
    ),
    OptionRefusal(
        "Arrow routing",
        "It has no tensors: it routes between whatever LoRAs happen to be loaded beside it.",
        "Name the LoRAs on the request, each with its scale.",
        "LORA",
        {"arrow_config": {"top_k": 2}},
    ),
    OptionRefusal(
        "An unknown field that is set",
        "It may change what the adapter computes, and nobody could tell that it was not honoured.",
        "Remove it if it means nothing; else say what it means in an issue.",
        "LORA",
        {"use_something_new": True},
    ),
)

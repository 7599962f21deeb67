"""The methods that the surveys of parameter-efficient fine-tuning name, and what becomes of each here.

Sources: Xu et al. (2312.12148) with its five classes, Ding et al. (s42256-023-00626-4, 2203.06904), LLM-Adapters
(2304.01933). Most methods differ in how they train; what is served is what they leave behind.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum


class Fate(StrEnum):
    """SERVED: a file of the method or of the library that trains it is served. CONVERTED: the method has no file format
    of its own; its result is one of a served family, exactly. REFUSED: it is not, for the reason given."""

    SERVED = "served"
    CONVERTED = "converted"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class SurveyMethod:
    """through: peft_types of the register. how: what it reduces to, or why it is refused."""

    name: str
    group: str
    fate: Fate
    through: tuple[str, ...]
    how: str


_DELTA = "sparse difference to the base's weights"
_MERGED = "one adapter once averaged"
_SURVEY: dict[str, dict[str, tuple[Fate, str, str]]] = {
    "Additive: adapters": {
        "Sequential Adapter": (Fate.SERVED, "AH_BOTTLENECK BOTTLENECK", "Houlsby's, after attention and feed-forward"),
        "Residual Adapter": (Fate.SERVED, "AH_BOTTLENECK", "Pfeiffer's place, after the feed-forward only"),
        "Parallel Adapter": (Fate.SERVED, "AH_BOTTLENECK BOTTLENECK", "beside the block; reads its residual stream"),
        "AdapterH": (Fate.SERVED, "BOTTLENECK", "LLM-Adapters' series adapter"),
        "AdapterP": (Fate.SERVED, "BOTTLENECK", "LLM-Adapters' adapter after the feed-forward"),
        "AdapterDrop": (Fate.SERVED, "AH_BOTTLENECK", "the dropped layers have no tensors"),
        "Compacter": (Fate.SERVED, "AH_BOTTLENECK", "Kronecker sums are expanded to a bottleneck at load"),
        "SparseAdapter": (Fate.SERVED, "AH_BOTTLENECK", "pruned entries are zeros"),
        "AdaMix": (Fate.CONVERTED, "AH_BOTTLENECK LORA", f"{_MERGED}, as its authors do for inference"),
        "AdapterSoup": (Fate.CONVERTED, "AH_BOTTLENECK", _MERGED),
        "MerA": (Fate.CONVERTED, "AH_BOTTLENECK", "one adapter once merged"),
        "Hyperformer": (Fate.CONVERTED, "AH_BOTTLENECK", "the hypernetwork's output for one task is an adapter"),
        "ProPETL": (Fate.CONVERTED, "AH_BOTTLENECK LORA", "prototype times mask, layer by layer"),
        "AdapterFusion": (Fate.REFUSED, "", "attention over the outputs of several adapters; name one of them"),
        "CoDA": (Fate.REFUSED, "", "a token's path depends on the scores of later tokens"),
        "Tiny-Attn Adapter": (Fate.REFUSED, "", "attention inside the adapter would need keys and values of its own"),
    },
    "Additive: soft prompts": {
        "Prompt-tuning": (Fate.SERVED, "PROMPT_TUNING", "virtual tokens before the prompt"),
        "P-tuning": (Fate.SERVED, "P_TUNING", "saved as virtual tokens"),
        "Prefix-tuning": (Fate.SERVED, "PREFIX_TUNING AH_PREFIX_TUNING", "keys and values in the sequence's pages"),
        "MPT": (Fate.SERVED, "MULTITASK_PROMPT_TUNING", "shared prompt times the task's rank-one factor"),
        "SPoT": (Fate.SERVED, "PROMPT_TUNING", "prompt tuning that starts from another task's prompt"),
        "WARP": (Fate.CONVERTED, "PROMPT_TUNING", "where its tokens stand before the text"),
        "ATTEMPT": (Fate.REFUSED, "", "the prompt is mixed by attention over the whole input"),
    },
    "Additive: others": {
        "(IA)3": (Fate.SERVED, "IA3 AH_LORA", "vectors that scale keys, values and the feed-forward"),
        "Hadamard Adapter": (
            Fate.CONVERTED,
            "IA3 BEFT",
            "a scale and a shift of the output: two adapters on a request",
        ),
        "ReFT": (Fate.SERVED, "AH_REFT", "a change of layers' outputs at the ends of a prompt"),
        "LST": (Fate.REFUSED, "", "a side network with a state of its own"),
        "PASTA": (Fate.REFUSED, "", "vectors at the special tokens of each layer; there is no format"),
        "AttentionFusion": (Fate.REFUSED, "", "attention over the layers' outputs"),
    },
    "Partial": {
        "BitFit": (Fate.SERVED, "PARTIAL BEFT", "trained biases; LoRA's bias option too"),
        "U-BitFit": (Fate.SERVED, "PARTIAL BEFT", "fewer of the biases"),
        "S-BitFit": (Fate.SERVED, "PARTIAL BEFT", "fewer of the biases"),
        "Threshold-Mask": (Fate.CONVERTED, "PARTIAL", "the masked weights as replacements"),
        "FISH Mask": (Fate.CONVERTED, "PARTIAL SHIRA", _DELTA),
        "LT-SFT": (Fate.CONVERTED, "PARTIAL SHIRA", _DELTA),
        "Child-Tuning": (Fate.CONVERTED, "PARTIAL SHIRA", _DELTA),
        "Diff Pruning": (Fate.CONVERTED, "PARTIAL SHIRA", _DELTA),
        "SAM": (Fate.CONVERTED, "PARTIAL SHIRA", _DELTA),
    },
    "Reparameterised": {
        "LoRA": (Fate.SERVED, "LORA AH_LORA", "low rank"),
        "DyLoRA": (Fate.SERVED, "LORA", "LoRA at the rank that is kept"),
        "AdaLoRA": (Fate.SERVED, "ADALORA", "rank by module; the singular values go into A"),
        "IncreLoRA": (Fate.SERVED, "LORA", "rank by module"),
        "SoRA": (Fate.SERVED, "LORA", "the gate goes into A; pruned ranks are gone"),
        "LoRA-FA": (Fate.SERVED, "LORA", "A was frozen while B was trained"),
        "KronA": (Fate.SERVED, "LOKR", "a Kronecker product of two factors"),
        "QLoRA": (Fate.SERVED, "LORA", "over the base as it is loaded, which is not quantised"),
        "Laplace-LoRA": (Fate.SERVED, "LORA", "the mean of the posterior; its samples are not"),
        "LoRAHub": (Fate.CONVERTED, "LORA", "one LoRA once composed"),
        "MOELoRA": (Fate.CONVERTED, "LORA", "its gate depends on the task alone: one LoRA for each"),
        "QA-LoRA": (Fate.SERVED, "LORA", "A repeated over each group of inputs, over the base as it is loaded"),
        "LoftQ": (Fate.CONVERTED, "LORA", "once converted against the original base"),
        "SAID": (Fate.CONVERTED, "PARTIAL", "the projected difference, written out"),
        "Delta-LoRA": (Fate.CONVERTED, "PARTIAL", "the base's weights were trained too: replaced ones"),
        "LoRAPrune": (Fate.CONVERTED, "PARTIAL", "pruned weights with LoRA merged in, as replacements"),
        "Kernel-mix-lite": (Fate.CONVERTED, "LORA", "low rank by head: block-structured factors of one LoRA"),
        "L-LoRA": (Fate.REFUSED, "", "a network linearised in its LoRA is another forward"),
    },
    "Hybrid": {
        "MAM Adapter": (Fate.SERVED, "AH_UNION", "prefix tuning and parallel adapters in one file"),
        "UniPELT": (Fate.REFUSED, "", "its gates are means over the sequence; without gates it is a union, and served"),
        "S4": (Fate.CONVERTED, "AH_UNION", "a union: several adapters on one request do too"),
        "AutoPEFT": (Fate.CONVERTED, "AH_UNION", "a union of bottlenecks and a prefix"),
        "S3Delta-M": (Fate.CONVERTED, "AH_UNION", "a union"),
    },
}


def methods() -> Iterator[SurveyMethod]:
    """Every method, group by group."""
    for group, members in _SURVEY.items():
        for name, (fate, through, how) in members.items():
            yield SurveyMethod(name, group, fate, tuple(through.split()), how)

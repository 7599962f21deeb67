"""A case: one family with one set of options, saved by HF PEFT with every trainable weight moved."""

from __future__ import annotations

import importlib
import itertools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

Move = Callable[[nn.Module, torch.Generator], None]
ALL_FIVE = ("llama", "qwen3", "gemma2", "gpt2", "opt")
_HERE = Path(__file__).parent

# The attention and feed-forward projections of each architecture, in one order: q k v o, then the feed-forward.
TARGETS: dict[str, list[str]] = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "qwen3": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gemma2": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "opt": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
}


def move_trainable(model: nn.Module, generator: torch.Generator) -> None:
    """Give every trainable weight a random value: around what it was, so that signs, norms and gates stay plausible."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.data = (parameter.data.float() + noise).to(parameter.dtype)


@dataclass(frozen=True)
class Case:
    """config: architecture -> peft config. move: what stands for training. edit: a last change to the saved folder.

    tokens: the prompt's tokens; None draws them.
    """

    name: str
    config: Callable[[str], Any]
    architectures: tuple[str, ...] = ALL_FIVE
    move: Move = move_trainable
    edit: Callable[[Path], None] | None = None
    tokens: tuple[int, ...] | None = None

    def save(self, base: Path, architecture: str, folder: Path, seed: int = 0) -> None:
        """Make the adapter with PEFT and save it to the folder."""
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = transformers.AutoModelForCausalLM.from_pretrained(base)
            adapted = peft.get_peft_model(model, self.config(architecture))
            self.move(adapted, torch.Generator().manual_seed(seed))
            adapted.save_pretrained(folder)
        if self.edit is not None:
            self.edit(folder)


@torch.inference_mode()
def peft_logprobs(base: Path, adapter: Path | None, prompt: list[int]) -> Tensor:
    """What PEFT makes of the folder: log-probabilities [len(prompt), vocabulary] in float32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager").eval()
        if adapter is not None:
            model = peft.PeftModel.from_pretrained(model, adapter).eval()
        logits = model(input_ids=torch.tensor([prompt])).logits[0].float()
    return torch.log_softmax(logits[-len(prompt) :], -1)


def all_cases() -> list[Case]:
    """The cases of every ``cases_*.py`` beside this file. Raises ValueError where two have one name."""
    modules = [importlib.import_module(f".{file.stem}", __package__) for file in sorted(_HERE.glob("cases_*.py"))]
    cases: list[Case] = list(itertools.chain.from_iterable(module.CASES for module in modules))
    names = [case.name for case in cases]
    if len(set(names)) < len(names):
        raise ValueError(f"two cases have one name: {sorted(names)}")
    return cases

"""A case: one family with one set of options, saved by HF PEFT with every trainable weight moved."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import tempfile
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

Move = Callable[[nn.Module, torch.Generator], None]
NUM_GREEDY = 4
ALL_FIVE = ("llama", "qwen3", "gemma2", "gpt2", "opt")
_HERE = Path(__file__).parent

# The attention and feed-forward projections of each architecture, in one order: q k v o, then the feed-forward.
TARGETS: dict[str, list[str]] = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "mistral": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "qwen3": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gemma2": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "opt": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "mixtral": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "qwen3_moe": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "gpt_oss": ["q_proj", "k_proj", "v_proj", "o_proj"],
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

    tokens: the prompt's tokens; None draws them. forward: further keyword arguments of PEFT's forward (a task's id).
    """

    name: str
    config: Callable[[str], Any]
    architectures: tuple[str, ...] = ALL_FIVE
    move: Move = move_trainable
    edit: Callable[[Path], None] | None = None
    tokens: tuple[int, ...] | None = None
    forward: Callable[[], dict[str, Any]] = dict

    @property
    def prompt(self) -> list[int]:
        if self.tokens is not None:
            return list(self.tokens)
        generator = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))
        return torch.randint(3, 128, (21,), generator=generator).tolist()

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


@dataclass(frozen=True)
class Made:
    """An adapter folder and what PEFT makes of it. tokens: the prompt and PEFT's own greedy continuation of it;
    logprobs: [len(tokens), vocabulary] float32, after each of them. adapter None: the plain base."""

    tokens: list[int]
    num_prompt: int
    logprobs: Tensor
    adapter: Path | None = None

    @property
    def prompt(self) -> list[int]:
        return self.tokens[: self.num_prompt]


def made(case: Case | None, architecture: str, base: Path, cache: Path, prompt: list[int]) -> Made:
    """Make a case's adapter, or find it in the cache, which test processes share. None: the plain base."""
    name = f"{'base' if case is None else case.name}-{architecture}-{len(prompt)}-{sum(prompt)}"
    if not (cache / name).exists():
        cache.mkdir(exist_ok=True)
        draft = Path(tempfile.mkdtemp(dir=cache))
        if case is not None:
            case.save(base, architecture, draft / "adapter")
        tokens, logprobs = _greedy(base, None if case is None else draft / "adapter", prompt, case)
        torch.save((tokens, logprobs), draft / "expected.pt")
        with contextlib.suppress(OSError):  # another process was faster
            draft.rename(cache / name)
    tokens, logprobs = torch.load(cache / name / "expected.pt")
    return Made(tokens, len(prompt), logprobs, None if case is None else cache / name / "adapter")


@torch.inference_mode()
def _greedy(base: Path, adapter: Path | None, prompt: list[int], case: Case | None) -> tuple[list[int], Tensor]:
    """PEFT's greedy tokens after a prompt, by full forwards, and the log-probabilities after every token."""
    tokens = list(prompt)
    options = {} if case is None else case.forward()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager").eval()
        if adapter is not None:
            model = peft.PeftModel.from_pretrained(model, adapter).eval()
        while True:
            logits = model(input_ids=torch.tensor([tokens]), **options).logits[0].float()
            logprobs = torch.log_softmax(logits[-len(tokens) :], -1)
            if len(tokens) == len(prompt) + NUM_GREEDY:
                return tokens, logprobs
            tokens.append(int(logprobs[-1].argmax()))


def all_cases() -> list[Case]:
    """The cases of every ``cases_*.py`` beside this file. Raises ValueError where two have one name."""
    modules = [importlib.import_module(f".{file.stem}", __package__) for file in sorted(_HERE.glob("cases_*.py"))]
    cases: list[Case] = list(itertools.chain.from_iterable(module.CASES for module in modules))
    names = [case.name for case in cases]
    if len(set(names)) < len(names):
        raise ValueError(f"two cases have one name: {sorted(names)}")
    return cases

"""Classification heads equal HF PEFT over its classifiers: in one batch with generation, in one go and in chunks."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from torch import Tensor

from onebase.serve.engine.logprobs import unpack
from onebase.serve.engine.messages import AdapterUse, Request, SamplingParams, TokenOutput

from .case import ALL_FIVE, NUM_GREEDY, TARGETS, all_cases, made, move_trainable

TOLERANCE = 1e-4
LABELS = 3
PAD = 0  # of all bases but gpt2, which has none
COMPANIONS = ("lora", "ia3")
KINDS = {
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
    "TOKEN_CLS": transformers.AutoModelForTokenClassification,
}
NO_TOKEN_CLASSIFIER = ("opt",)  # transformers has none
CONFIGS: dict[str, Callable[..., Any]] = {
    "lora": lambda names, task: peft.LoraConfig(task_type=task, r=4, target_modules=names),
    "ia3": lambda names, task: peft.IA3Config(task_type=task, target_modules=names[:1], feedforward_modules=[]),
    "prompt": lambda names, task: peft.PromptTuningConfig(task_type=task, num_virtual_tokens=5),
    "prefix": lambda names, task: peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=6),
}


@dataclass(frozen=True)
class Classifier:
    """An adapter with a head, and what PEFT makes of a prompt: probabilities [1 or tokens, LABELS]."""

    name: str
    adapter: Path
    prompt: list[int]
    probs: Tensor


def classifier(
    base: Path, architecture: str, task: str, family: str, prompt: list[int], folder: Path, labels: int = LABELS
) -> Classifier:
    """Made by PEFT, saved, loaded by PEFT again, run by it."""
    adapter = folder / f"{task}-{family}"
    load: Any = KINDS[task]
    torch.manual_seed(len(family))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = load.from_pretrained(base, num_labels=labels)
        adapted = peft.get_peft_model(model, CONFIGS[family](TARGETS[architecture], task))
        move_trainable(adapted, torch.Generator().manual_seed(5))
        adapted.save_pretrained(adapter)
        plain = load.from_pretrained(base, num_labels=labels, attn_implementation="eager").eval()
        loaded = peft.PeftModel.from_pretrained(plain, adapter).eval()
    with torch.inference_mode():
        logits = loaded(input_ids=torch.tensor([prompt])).logits.float()
    rows = logits.view(-1, labels)[-len(prompt) :]  # virtual tokens have none of ours
    return Classifier(adapter.name, adapter, prompt, torch.softmax(rows, -1))


class Listener:
    """Requests of a driver's engine, and what was said of each."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver
        self.said: dict[str, list[TokenOutput]] = {}

    def add(self, name: str, prompt: list[int], use: AdapterUse, *, classifies: bool = False) -> None:
        sampling = SamplingParams(
            0 if classifies else NUM_GREEDY, temperature=0.0, ignore_eos=True, logprobs=None if classifies else 0
        )
        assert not self.driver.engine.add(Request(name, tuple(prompt), sampling, (use,), classifies))

    def run(self) -> None:
        while self.driver.engine.has_work:
            for output in self.driver.engine.step():
                assert isinstance(output, TokenOutput), output
                self.said.setdefault(output.id, []).append(output)
            self.driver.engine.check()

    def probs(self, name: str) -> Tensor:
        *told, last = self.said[name]
        assert last.finish_reason == "length"
        assert not any(output.tokens for output in self.said[name])
        parts = [output.classes for output in told]
        raw = b"".join(part.logits for part in parts if part is not None)
        logits = torch.from_numpy(np.frombuffer(raw, np.float32).reshape(-1, parts[0].num_labels).copy())
        return torch.softmax(logits, -1)

    def logprobs(self, name: str) -> list[tuple[int, float | None]]:
        found = [one for output in self.said[name] if output.logprobs for one in unpack(output.logprobs)]
        return [(one.token, one.logprob) for one in found]


def classifiers(base: Path, architecture: str, prompt: list[int], folder: Path) -> list[Classifier]:
    tasks = [task for task in KINDS if task == "SEQ_CLS" or architecture not in NO_TOKEN_CLASSIFIER]
    return [
        classifier(base, architecture, task, family, prompt[at:] + [PAD] * (at % 3), folder)
        for at, (task, family) in enumerate((task, family) for task in tasks for family in CONFIGS)
    ]


@pytest.mark.parametrize("architecture", ALL_FIVE)
@pytest.mark.parametrize("options", [{}, {"max_batch_tokens": 16}], ids=["one go", "chunks"])
def test_heads_equal_peft_beside_generation(
    options: dict[str, Any],
    architecture: str,
    checkpoint: Callable[..., Path],
    make_driver: Callable[..., Any],
    families_cache: Path,
    tmp_path: Path,
) -> None:
    base, driver = checkpoint(architecture), make_driver(architecture, **options)
    cases = [case for case in all_cases() if case.name in COMPANIONS]
    generated = {case.name: made(case, architecture, base, families_cache, case.prompt) for case in cases}
    found = classifiers(base, architecture, cases[0].prompt, tmp_path)
    listener = Listener(driver)
    for folder in [*(one.adapter for one in found), *(one.adapter for one in generated.values())]:
        driver.submit([5], driver.use(folder), max_tokens=1)  # resident, so that they do meet
    driver.run()
    assert not driver.failures
    before = driver.engine.stats().steps
    for name, one in generated.items():
        listener.add(name, one.prompt, driver.use(one.adapter))
    for done in found:
        listener.add(done.name, done.prompt, driver.use(done.adapter), classifies=True)
    listener.run()
    assert options or driver.engine.stats().steps - before == NUM_GREEDY, "they did not share their forwards"
    for done in found:
        torch.testing.assert_close(listener.probs(done.name), done.probs, atol=TOLERANCE, rtol=0)
        assert float(done.probs.max() - done.probs.min()) > 0.05, "a head of zeros would pass"
    for name, one in generated.items():
        wanted = one.tokens[one.num_prompt :]
        expected = [float(one.logprobs[one.num_prompt - 1 + at, token]) for at, token in enumerate(wanted)]
        said = listener.logprobs(name)
        assert [token for token, _ in said] == wanted
        assert [value for _, value in said] == pytest.approx(expected, abs=TOLERANCE)
    for folder in {use.adapter for use in [*found, *generated.values()]}:
        assert driver.engine.adapters.unload(str(folder))
    assert driver.engine.adapters.arena.used == 0

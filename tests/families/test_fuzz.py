"""Edited adapter folders are refused by name, or served as PEFT serves the same folder."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor

from onebase.adapters.errors import AdapterRejected, AdapterTooLarge

from .case import Case, all_cases, made
from .fuzz import Edit, edits

CASES = [case for case in all_cases() if "llama" in case.architectures]
TOLERANCE = 1e-3  # test_families is finer; at some positions PEFT itself is 1e-4 from what float64 gives
NUM_QUICK = 5  # edits of one case of each family, which run in every run
QUICK = {type(case.config("llama")): case for case in reversed(CASES)}.values()
SLOW = [pytest.mark.slow, pytest.mark.timeout(3600)]
# PEFT finds FRoD's left factor from the basis that it computes on loading, and only then reads the file's basis.
UNDECIDED = {"frod": ("regularization_alpha", "base_model.frod_V")}


class Bench:
    """One base in an engine, and the same in transformers."""

    def __init__(self, base: Path, driver: Any, cache: Path) -> None:
        self.base, self.driver, self.cache = base, driver, cache
        self.plain: Any = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager").eval()

    def verdict(self, case: Case, folder: Path) -> str | None:
        """What is wrong with how an edited folder is treated. None: nothing."""
        try:
            self.driver.engine.adapters.transit.fetcher.compile(folder, "d")
        except (AdapterRejected, AdapterTooLarge) as error:
            return None if error.param else f"refused without a param: {error}"
        expected = self.expected(case, folder)
        if expected is None:
            return None
        use = self.driver.use(folder)
        found = self.driver.logprobs([(case.prompt, (use,))], 6)[0]
        assert self.driver.engine.adapters.unload(use.digest)
        error = max(float((got - expected[at]).abs().max()) for at, got in found.items())
        largest = float(expected.abs().max())  # wild edits make logits in the thousands, which float32 rounds
        return None if error < TOLERANCE * max(1.0, largest / 30) else f"served otherwise than by PEFT: {error:.1e}"

    @torch.inference_mode()
    def expected(self, case: Case, folder: Path) -> Tensor | None:
        """PEFT's log-probabilities; None where it cannot load or run the folder, and so has no answer."""
        with warnings.catch_warnings(), contextlib.suppress(Exception):
            warnings.simplefilter("ignore")
            model = peft.PeftModel.from_pretrained(copy.deepcopy(self.plain), folder).eval()
            logits = model(input_ids=torch.tensor([case.prompt]), **case.forward()).logits[0].float()
            return torch.log_softmax(logits[-len(case.prompt) :], -1)
        return None


@pytest.fixture(scope="module")
def bench(checkpoint: Callable[..., Path], make_driver: Callable[..., Any], families_cache: Path) -> Bench:
    return Bench(checkpoint("llama"), make_driver("llama", kv_memory=0.02), families_cache)


@pytest.mark.parametrize("case", QUICK, ids=[case.name for case in QUICK])
def test_some_edited_folders(case: Case, bench: Bench, tmp_path: Path) -> None:
    every = _edits(case, bench)
    step = max(1, len(every) // NUM_QUICK)
    assert not dict(_wrong(case, every[len(case.name) % step :: step], bench, tmp_path))


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name, marks=SLOW) for case in CASES])
def test_every_edited_folder(case: Case, bench: Bench, tmp_path: Path) -> None:
    assert not dict(_wrong(case, _edits(case, bench), bench, tmp_path))


def _edits(case: Case, bench: Bench) -> list[Edit]:
    adapter = made(case, "llama", bench.base, bench.cache, case.prompt).adapter
    assert adapter is not None
    return [edit for edit in edits(adapter) if not edit.name.startswith(UNDECIDED.get(case.name, ()))]


def _wrong(case: Case, chosen: list[Edit], bench: Bench, folder: Path) -> Iterator[tuple[str, str]]:
    for at, edit in enumerate(chosen):
        edit.write(folder / str(at))
        if verdict := bench.verdict(case, folder / str(at)):
            yield edit.name, verdict

"""What drafts by prompt lookup bring where text repeats, and what they cost where it does not.

The weights are random, so biases make the text: one token for ever (every draft is right), draws among a few tokens
(drafts are found and nearly all wrong), draws among all of them (none is found).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from onebase.bench.report import ratio, show, store
from onebase.bench.workload import random_model
from onebase.serve.engine.config import EngineConfig
from onebase.serve.engine.engine import Engine
from onebase.serve.engine.messages import Request, SamplingParams
from onebase.serve.model.loader import prepare

_ROUNDS = 3
_PROMPT = 128
_FEW = range(20, 52)
CASES = {
    "every draft right": SamplingParams(temperature=0.0, logit_bias=((20, 100.0),)),
    "drafts wrong": SamplingParams(temperature=1.0, logit_bias=tuple((token, 100.0) for token in _FEW)),
    "no draft found": SamplingParams(temperature=1.0),
}


def run(shape: str, device: str, rows: int, tokens: int, out: Path | None) -> None:
    """Print tokens per second with and without drafts, of ``rows`` sequences of so many tokens each."""
    engines = {name: _engine(shape, device, rows, name) for name in ("off", "ngram")}
    results = {case: _measure(engines, rows, tokens, sampling) for case, sampling in CASES.items()}
    for case, result in results.items():
        show(f"{shape} on {device}, {rows} rows, {case}", result)
    store(out, "speculate", {"shape": shape, "rows": rows, "results": results})


def _measure(engines: Mapping[str, Engine], rows: int, tokens: int, sampling: SamplingParams) -> dict[str, str]:
    """Both sides in turns."""
    spent: dict[str, list[float]] = {name: [] for name in engines}
    before = replace(engines["ngram"].counters)
    for _ in range(_ROUNDS):
        for name, engine in engines.items():
            spent[name].append(_seconds(engine, rows, tokens, sampling))
    after = engines["ngram"].counters
    drafted = after.drafted_tokens - before.drafted_tokens
    accepted = after.accepted_tokens - before.accepted_tokens
    return {
        **{f"{name}: tokens/s": f"{rows * tokens / statistics.median(spent[name]):.1f}" for name in engines},
        "with / without drafts, in time": f"{ratio(spent['ngram'], spent['off']):.2f}",
        "drafts a token": f"{drafted / (_ROUNDS * rows * tokens):.2f}",
        "drafts that were right": f"{accepted / max(drafted, 1):.2f}",
    }


def _engine(shape: str, device: str, rows: int, speculate: str) -> Engine:
    config = EngineConfig(
        model=shape,
        device=device,
        max_num_seqs=rows,
        max_model_len=512,
        kv_memory=0.25,
        adapter_memory=0.01,
        prefix_caching=False,
        speculate=speculate,
    )
    return Engine(config, prepare(random_model(shape, torch.bfloat16, device), config))


def _seconds(engine: Engine, rows: int, tokens: int, sampling: SamplingParams) -> float:
    """From the first decode to the last token."""
    prompts = np.random.default_rng(1).choice(_FEW, (rows, _PROMPT)).tolist()
    for row, prompt in enumerate(prompts):
        asked = replace(sampling, max_tokens=tokens + 1, seed=row, ignore_eos=True)
        engine.add(Request(f"row-{row}", tuple(prompt), asked))
    while any(s.num_uncomputed > 1 for s in engine.scheduler.running) or engine.scheduler.waiting:
        engine.step()
    start = time.perf_counter()
    while engine.has_work:
        engine.step()
    return time.perf_counter() - start

"""Many adapters at once, beside Hugging Face: tokens per second of the same requests on both sides, in one run.

Ours: the engine in this process, a closed loop of clients. Theirs: `generate` on static batches as large as the number
of clients, plain, and through PEFT with `adapter_names`. Rounds are interleaved; ratios are taken round by round.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from onebase.bench.ours import Run, closed_loop, make_resident
from onebase.bench.report import Spread, ratio, show, store
from onebase.bench.workload import SHAPES, Load, mixed_ranks, random_model, save_adapters
from onebase.serve.engine.config import EngineConfig
from onebase.serve.engine.engine import Engine
from onebase.serve.model.loader import prepare

Side = Callable[[], Run]


@torch.inference_mode()
def hf_generate(
    model: Any, prompts: Sequence[Sequence[int]], tokens_out: int, batch: int, adapters: Sequence[str] | None = None
) -> Run:
    """transformers' `generate` on static batches; with PEFT's adapter per row where ``adapters`` names them."""
    options = GenerationConfig(
        max_new_tokens=tokens_out, min_new_tokens=tokens_out, do_sample=False, pad_token_id=0, eos_token_id=1
    )
    start, tokens = time.perf_counter(), 0
    for at in range(0, len(prompts), batch):
        ids = torch.tensor(prompts[at : at + batch])
        names = {"adapter_names": list(adapters[at : at + batch])} if adapters else {}
        mask = torch.ones_like(ids)
        out = model.generate(input_ids=ids, attention_mask=mask, generation_config=options, **names)
        tokens += (out.shape[1] - ids.shape[1]) * ids.shape[0]
    return Run(time.perf_counter() - start, tokens)


def _peft_model(model: PreTrainedModel, folders: Sequence[Path]) -> tuple[Any, list[str]]:
    import peft

    names = [f"adapter{i}" for i in range(len(folders))]
    adapted = peft.PeftModel.from_pretrained(model, folders[0], adapter_name=names[0])
    for name, folder in zip(names[1:], folders[1:], strict=True):
        adapted.load_adapter(folder, adapter_name=name)
    return adapted.eval(), names


def run(load: Load, *, clients: int, num_adapters: int, rounds: int, dtype: torch.dtype, out: Path | None) -> None:
    """Print both sides, and store them. Shape: 135m, on the CPU."""
    with tempfile.TemporaryDirectory(prefix="onebase-bench-") as name:
        folders = save_adapters(random_model("135m", dtype, "cpu"), Path(name), mixed_ranks(num_adapters))
        sides = _sides(load, clients, folders, dtype)
        runs: dict[str, list[Run]] = {side: [] for side in sides}
        for side in sides.values():
            side()  # warm-up: pages, packs, adapters
        for _ in range(rounds):
            for key, side in sides.items():
                runs[key].append(side())
    _report(load, clients, num_adapters, runs, out)


def _sides(load: Load, clients: int, folders: Sequence[Path], dtype: torch.dtype) -> dict[str, Side]:
    prompts = load.prompts(SHAPES["135m"].vocab_size)
    config = EngineConfig(
        model="135m",
        device="cpu",
        max_num_seqs=clients,
        kv_memory=1.0,
        adapter_memory=2.0,
        prefix_caching=False,  # rounds repeat their prompts, and theirs compute each of them
    )
    engine = Engine(config, prepare(random_model("135m", dtype, "cpu"), config))
    make_resident(engine, folders)
    adapters = [folders[i % len(folders)] for i in range(len(prompts))]
    plain = random_model("135m", dtype, "cpu")
    adapted, names = _peft_model(random_model("135m", dtype, "cpu"), folders)
    rows = [names[i % len(names)] for i in range(len(prompts))]
    return {
        "ours, base": lambda: closed_loop(engine, prompts, [None] * len(prompts), load.tokens_out, clients),
        "generate, base": lambda: hf_generate(plain, prompts, load.tokens_out, clients),
        "ours, adapters": lambda: closed_loop(engine, prompts, adapters, load.tokens_out, clients),
        "PEFT, adapters": lambda: hf_generate(adapted, prompts, load.tokens_out, clients, rows),
    }


def _report(load: Load, clients: int, num_adapters: int, runs: dict[str, list[Run]], out: Path | None) -> None:
    rates = {name: [run.tokens_per_second for run in several] for name, several in runs.items()}
    ratios = {
        "base: ours / generate": ratio(rates["ours, base"], rates["generate, base"]),
        "adapters: ours / PEFT": ratio(rates["ours, adapters"], rates["PEFT, adapters"]),
        "ours: adapters / base, in tokens/s": ratio(rates["ours, adapters"], rates["ours, base"]),
    }
    rows = {f"{name}, tokens/s": str(Spread(tuple(values))) for name, values in rates.items()}
    title = f"{clients} clients, {load.tokens_in} in, {load.tokens_out} out, {num_adapters} adapters of rank 8 to 64"
    show(title, rows | {name: f"{value:.2f}" for name, value in ratios.items()})
    store(out, "mixed", {"load": asdict(load), "clients": clients, "tokens_per_second": rates, "ratios": ratios})

"""Many adapters at once, beside Hugging Face: tokens per second of the same requests on both sides, in one run.

Ours: a closed loop of clients, over the engine in this process, or over HTTP to the real server. Theirs: `generate` on
static batches as large as the number of clients, plain, and through PEFT with `adapter_names`. Rounds are interleaved;
ratios are taken round by round.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from onebase.bench import http_loop
from onebase.bench.http_server import BASE, save_model, serving
from onebase.bench.ours import Run, closed_loop, make_resident
from onebase.bench.report import Spread, ratio, show, store
from onebase.bench.workload import SHAPES, Load, mixed_ranks, random_model, save_adapters
from onebase.serve.engine.config import EngineConfig
from onebase.serve.engine.engine import Engine
from onebase.serve.model.loader import prepare

Side = Callable[[], Run]
_KV_GIB, _ADAPTER_GIB = 1.0, 2.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What is run. http: ours through the server. shape: of workload.SHAPES; all of it on the CPU."""

    load: Load
    clients: int = 16
    num_adapters: int = 16
    rounds: int = 3
    dtype: torch.dtype = torch.bfloat16
    http: bool = False
    shape: str = "135m"

    @property
    def prompts(self) -> list[list[int]]:
        return self.load.prompts(SHAPES[self.shape].vocab_size)

    def model(self) -> PreTrainedModel:
        """The same weights at every call."""
        return random_model(self.shape, self.dtype, "cpu")


def run(plan: Plan, out: Path | None) -> None:
    """Print both sides, and store them."""
    with tempfile.TemporaryDirectory(prefix="onebase-bench-") as name:
        folders = save_adapters(plan.model(), Path(name), mixed_ranks(plan.num_adapters))
        ours = _served(plan, folders, Path(name)) if plan.http else _in_process(plan, folders)
        with ours as sides:
            runs = _take_turns(_interleaved(sides, _theirs(plan, folders)), plan.rounds)
    _report(plan, runs, out)


def _interleaved(ours: dict[str, Side], theirs: dict[str, Side]) -> dict[str, Side]:
    return {name: side for pair in zip(ours.items(), theirs.items(), strict=True) for name, side in pair}


def _take_turns(sides: dict[str, Side], rounds: int) -> dict[str, list[Run]]:
    """The first turn of each side is not counted: pages, packs, adapters."""
    for side in sides.values():
        side()
    runs: dict[str, list[Run]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            runs[name].append(side())
    return runs


@contextmanager
def _in_process(plan: Plan, folders: Sequence[Path]) -> Iterator[dict[str, Side]]:
    config = EngineConfig(
        model=plan.shape,
        device="cpu",
        max_num_seqs=plan.clients,
        kv_memory=_KV_GIB,
        adapter_memory=_ADAPTER_GIB,
        prefix_caching=False,  # rounds repeat their prompts, and theirs compute each of them
    )
    engine = Engine(config, prepare(plan.model(), config))
    make_resident(engine, folders)
    prompts = plan.prompts
    rows = [folders[i % len(folders)] for i in range(len(prompts))]
    out, clients = plan.load.tokens_out, plan.clients
    yield {
        "ours, base": lambda: closed_loop(engine, prompts, [None] * len(prompts), out, clients),
        "ours, adapters": lambda: closed_loop(engine, prompts, rows, out, clients),
    }
    engine.close()


@contextmanager
def _served(plan: Plan, folders: Sequence[Path], place: Path) -> Iterator[dict[str, Side]]:
    model = save_model(plan.model(), place / "model")
    names = {folder.name: folder for folder in folders}
    options = ["--device", "cpu", "--max-num-seqs", str(plan.clients), "--no-prefix-caching"]
    options += ["--kv-memory", str(_KV_GIB), "--adapter-memory", str(_ADAPTER_GIB)]
    rows = [list(names)[i % len(names)] for i in range(plan.load.num_requests)]
    with serving(model, names, options, place / "data") as server:

        def side(models: Sequence[str]) -> Side:
            pairs = zip(models, plan.prompts, strict=True)
            calls = [http_loop.Call(name, prompt, plan.load.tokens_out) for name, prompt in pairs]
            return lambda: http_loop.closed_loop(server, calls, plan.clients)

        yield {"ours, base": side([BASE] * len(rows)), "ours, adapters": side(rows)}


def _theirs(plan: Plan, folders: Sequence[Path]) -> dict[str, Side]:
    prompts, out, batch = plan.prompts, plan.load.tokens_out, plan.clients
    plain = plan.model()
    adapted, names = _peft_model(plan.model(), folders)
    rows = [names[i % len(names)] for i in range(len(prompts))]
    return {
        "generate, base": lambda: hf_generate(plain, prompts, out, batch),
        "PEFT, adapters": lambda: hf_generate(adapted, prompts, out, batch, rows),
    }


def _peft_model(model: PreTrainedModel, folders: Sequence[Path]) -> tuple[Any, list[str]]:
    import peft

    names = [f"adapter{i}" for i in range(len(folders))]
    adapted = peft.PeftModel.from_pretrained(model, folders[0], adapter_name=names[0])
    for name, folder in zip(names[1:], folders[1:], strict=True):
        adapted.load_adapter(folder, adapter_name=name)
    return adapted.eval(), names


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


def _report(plan: Plan, runs: dict[str, list[Run]], out: Path | None) -> None:
    rates = {name: [run.tokens_per_second for run in several] for name, several in runs.items()}
    ratios = {
        "base: ours / generate": ratio(rates["ours, base"], rates["generate, base"]),
        "adapters: ours / PEFT": ratio(rates["ours, adapters"], rates["PEFT, adapters"]),
        "ours: adapters / base, in tokens/s": ratio(rates["ours, adapters"], rates["ours, base"]),
    }
    rows = {f"{name}, tokens/s": str(Spread(tuple(values))) for name, values in rates.items()}
    rows |= {name: f"{value:.2f}" for name, value in ratios.items()}
    for name, several in runs.items():
        rows |= {f"{name}, {what}": value for what, value in _http_figures(several).items()}
    way = "over HTTP" if plan.http else "in process"
    load = f"{plan.clients} clients, {plan.load.tokens_in} in, {plan.load.tokens_out} out"
    show(f"{load}, {plan.num_adapters} adapters of rank 8 to 64, {way}", rows)
    figures = {"http": plan.http, "load": asdict(plan.load), "clients": plan.clients}
    store(out, "mixed", figures | {"tokens_per_second": rates, "ratios": ratios, "rows": rows})


def _http_figures(runs: Sequence[Run]) -> dict[str, str]:
    """Of the last round over HTTP: latencies, and the CPU's share of each process."""
    last = runs[-1]
    if not isinstance(last, http_loop.HttpRun):
        return {}
    shares = ", ".join(f"{name} {seconds / last.seconds:.2f}" for name, seconds in last.cpu.items())
    gaps = f"{1e3 * last.gap(50):.0f} / {1e3 * last.gap(99):.0f}"
    return {"TTFT p50, s": f"{last.ttft(50):.2f}", "ITL p50 / p99, ms": gaps, "cores busy": shares}

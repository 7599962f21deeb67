"""The figures that need a GPU, stage by stage, without the command line's libraries: `python -m onebase.bench.gpu`.

bench/gpu.sh runs all of them, the correctness tests first.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from onebase.bench import kernels, lifecycle, step
from onebase.bench.bed import Plan
from onebase.bench.kernels_clock import copy_bandwidth, medians
from onebase.bench.kernels_tune import tune
from onebase.bench.report import show, store
from onebase.bench.workload import random_model
from onebase.serve.engine.config import EngineConfig
from onebase.serve.engine.engine import Engine
from onebase.serve.engine.messages import Request, SamplingParams
from onebase.serve.model.loader import prepare

_BATCHES = (1, 16, 64)
_PROMPTS, _PROMPT = 8, 1024
_ROUNDS = 1  # loading 64 adapters anew takes most of the time
_GEMM = 8192
_TUNE_SECONDS = 420.0


def run_kernels(device: str, shape: str, out: Path) -> None:
    """The grid of shrink and expand at width 4096, beside other ways."""
    kernels.run(device, hidden=(4096,), rounds=3, out=out / "kernels-4096.json", table=out / "kernels-4096.csv")


def run_widths(device: str, shape: str, out: Path) -> None:
    """The rest of that grid."""
    kernels.run(
        device, hidden=(1024, 8192), rounds=3, out=out / "kernels-others.json", table=out / "kernels-others.csv"
    )


def run_tune(device: str, shape: str, out: Path) -> None:
    """This device's table of configurations, for kernels/tuned."""
    tune(device, out / "tuned", ranks=(16, 64), rows=(64, 1), most_seconds=_TUNE_SECONDS)


def run_step(device: str, shape: str, out: Path) -> None:
    """Decode steps with graphs and eager, base and 64 adapters of rank 16, beside the time to read the weights."""
    ranks, results = [16] * max(_BATCHES), []
    with tempfile.TemporaryDirectory(prefix="onebase-bench-") as name:
        engine, folders = step.make_engine(shape, device, max(_BATCHES), ranks, Path(name))
        bandwidth, graphs = copy_bandwidth(torch.device(device)), engine.runner.graphs
        floor = 1e3 * _weight_bytes(shape) / bandwidth
        for rows in _BATCHES:
            for side, used in (("graphs", graphs), ("eager", None)):
                engine.runner.graphs = used
                found = step.measure(engine, rows, folders[:rows], steps=32, rounds=_ROUNDS)
                base, mixed = found["base, none loaded: ms a step"], found["adapters: ms a step"]
                added = 1e3 * rows * _adapter_bytes(engine) / bandwidth
                shares = {"base / floor": base / floor, "adapters / (base + their bytes)": mixed / (base + added)}
                results.append({"side": side, "weights at copy speed, ms": floor} | found | shares)
                show(f"{shape}, {rows} rows, {side}", {k: f"{v:.3f}" for k, v in (found | shares).items()})
                store(
                    out / "step.json", "step", {"shape": shape, "copy_bytes_per_second": bandwidth, "results": results}
                )


def _weight_bytes(shape: str) -> int:
    """What a decode step reads of the base: all but the embeddings' table."""
    model = random_model(shape, torch.bfloat16, "meta")
    table = model.get_input_embeddings().weight
    tied = table is model.get_output_embeddings().weight
    return sum(p.nbytes for p in model.parameters() if tied or p is not table)


def _adapter_bytes(engine: Engine) -> float:
    """Mean of those on the device."""
    return engine.adapters.arena.used_bytes / max(1, len(engine.adapters.resident()))


def run_prefill(device: str, shape: str, out: Path) -> None:
    """8 prompts of 1,024 tokens in one step, as a share of the measured rate of a large product."""
    tokens = _PROMPTS * _PROMPT
    config = EngineConfig(
        shape, device=device, max_batch_tokens=tokens, max_num_seqs=_PROMPTS, max_model_len=2048, kv_memory=8.0,
        prefix_caching=False,
    )  # fmt: skip
    model = random_model(shape, torch.bfloat16, device)
    head = model.get_output_embeddings().weight.numel()
    products = sum(p.numel() for p in model.parameters()) - head - model.get_input_embeddings().weight.numel()
    engine = Engine(config, prepare(model, config))
    seconds = min(_prefill(engine) for _ in range(5))
    operations = 2 * products * tokens + 2 * head * _PROMPTS  # attention's own are left out
    rate, gemm = operations / seconds, _gemm_rate(torch.device(device))
    figures = {"seconds": seconds, "tokens/s": tokens / seconds, "share of the GEMM rate": rate / gemm}
    show(
        f"{shape}: prefill of {_PROMPTS} x {_PROMPT} tokens", {name: f"{value:.3f}" for name, value in figures.items()}
    )
    store(out / "prefill.json", "prefill", {"shape": shape, "gemm_flops_per_second": gemm} | figures)


def _prefill(engine: Engine) -> float:
    sampling = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
    for row in range(_PROMPTS):
        engine.add(Request(f"prompt-{row}", tuple(10 + (row + at) % 1000 for at in range(_PROMPT)), sampling))
    started = time.perf_counter()
    while engine.has_work:
        engine.step()
    return time.perf_counter() - started


def _gemm_rate(device: torch.device) -> float:
    """bf16 operations per second of a large square product."""
    a = torch.randn(_GEMM, _GEMM, dtype=torch.bfloat16, device=device)
    product = torch.empty_like(a)

    def multiply() -> None:
        torch.mm(a, a, out=product)

    return 2 * _GEMM**3 / medians({"gemm": multiply}, device, rounds=5)["gemm"]


def run_lifecycle(device: str, shape: str, out: Path) -> None:
    """More adapters than the device holds, turns, cold starts."""
    plan = Plan(shape, device, 96, 32, 16, 8, 48, 16, 2)
    lifecycle.run(plan, (), out / "lifecycle.json")


STAGES: Mapping[str, Callable[[str, str, Path], None]] = {
    "kernels": run_kernels,
    "widths": run_widths,
    "step": run_step,
    "prefill": run_prefill,
    "lifecycle": run_lifecycle,
    "tune": run_tune,
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stages", nargs="+", choices=STAGES)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", default="8b")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    given: Any = parser.parse_args(arguments)
    for stage in given.stages:
        STAGES[stage](given.device, given.shape, given.out)


if __name__ == "__main__":
    main()

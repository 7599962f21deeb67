"""What a decoder layer's adapters cost in launches: at most eight, and none where a group has nothing to do.

Kernels are replaced by counters: nothing is computed, so every architecture takes moments.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from onebase.adapters.base import SiteKind
from onebase.kernels import matmul_triton
from onebase.kernels.attention import AttentionBatch
from onebase.kernels.instructions import InstructionTable
from onebase.kernels.plan import BatchPlan
from onebase.kernels.tables import Operands, ProgramTables, SiteShape
from onebase.serve.engine.config import EngineConfig
from onebase.serve.model.loader import LoadedModel, load_model
from onebase.serve.model.site_context import SiteContext, StepPlans
from onebase.serve.model.sites import wrap_sites

ROWS = 3


class Counting:
    """Stands for a kernel: counts its launches."""

    def __init__(self, name: str, launches: Counter[str]) -> None:
        self._name, self._launches = name, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            self._launches[self._name] += 1

        return launch


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    counter: Counter[str] = Counter()
    for name in ("shrink_kernel", "expand_kernel", "scale_in_kernel", "shrink_rows_kernel", "expand_rows_kernel"):
        monkeypatch.setattr(matmul_triton, name, Counting(name.replace("_rows", ""), counter))
    return counter


LORA = Operands(4, 1.0, 0, 0)


def adapted(
    base: LoadedModel, wanted: Callable[[str], bool], operands: Callable[[str], Operands] = lambda path: LORA
) -> StepPlans:
    """The base behind a program with those operands at those linear sites, under a plan of which every row uses it."""
    sites = [entry.site for entry in base.probed]
    tables = ProgramTables(torch.zeros(1 << 16), [SiteShape(site.in_features, site.out_features) for site in sites])
    linears = [at for at, site in enumerate(sites) if site.kind is SiteKind.LINEAR and wanted(site.path)]
    tables.install(0, {at: operands(sites[at].path) for at in linears})
    instructions, plan = InstructionTable(), BatchPlan.from_rows([((0, 1.0),)] * ROWS)
    instructions.install(0, {})
    plans = StepPlans(plan, plan)
    context = SiteContext(matmul_triton.TritonKernels(tables), tables, instructions, plans)
    wrap_sites(base.probed, base.norms, base.blocks, context)
    return plans


@torch.inference_mode()
def run(base: LoadedModel) -> None:
    size = base.context.page_size
    base.context.batch = AttentionBatch.build([ROWS], [ROWS], [[0]], size, base.device)
    base.model(
        input_ids=torch.zeros(1, ROWS, dtype=torch.int64), position_ids=torch.arange(ROWS)[None], use_cache=False
    )


def in_layer(paths: Iterable[str]) -> Callable[[str], bool]:
    ends = tuple(paths)
    return lambda path: (".layers.1." in path or ".h.1." in path) and path.endswith(ends)


# What one layer costs with adapters on all of its linear modules.
WHOLE = {
    **dict.fromkeys(("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "olmo2"), 8),
    **dict.fromkeys(("phi3", "gpt2", "opt", "gpt_neox"), 8),
    **dict.fromkeys(("mixtral", "qwen3_moe", "gpt_oss"), 4),  # routed experts have instructions of their own
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_layer_costs_at_most_eight_launches(
    name: str, checkpoint: Callable[..., Any], launches: Counter[str]
) -> None:
    base = load_model(EngineConfig(model=str(checkpoint(name)), device="cpu", dtype="float32"))
    adapted(base, in_layer(("",)))
    run(base)
    assert launches["shrink_kernel"] == launches["expand_kernel"]
    assert sum(launches.values()) == WHOLE[name] <= 8


@pytest.mark.parametrize(
    ("paths", "count"), [(("q_proj", "v_proj"), 2), (("down_proj",), 2), (("o_proj", "gate_proj"), 4), (("none",), 0)]
)
def test_groups_with_nothing_to_do_are_not_launched(
    paths: tuple[str, ...], count: int, checkpoint: Callable[..., Any], launches: Counter[str]
) -> None:
    base = load_model(EngineConfig(model=str(checkpoint("llama")), device="cpu", dtype="float32"))
    adapted(base, in_layer(paths))
    run(base)
    assert sum(launches.values()) == count


GAIN = Operands(0, 1.0, 0, 0, gain=0)
# By family: its operands at a site, and how many shrinks, expands and scaled inputs a layer costs.
VECTORS: dict[str, tuple[Callable[[str], Operands], tuple[int, int, int]]] = {
    "dora": (lambda path: replace(LORA, gain=0), (4, 4, 0)),
    "dora with bias": (lambda path: replace(LORA, gain=0, add_out=0), (4, 4, 0)),
    "road": (lambda path: replace(GAIN, sine=0, group=16), (0, 4, 0)),
    "road beside lora": (lambda path: replace(LORA, gain=0, sine=0, group=16), (4, 4, 0)),
    "scale_out": (lambda path: GAIN, (0, 4, 0)),
}


def ia3(path: str) -> Operands:
    return replace(GAIN, gain=-1, gain_in=0) if path.endswith("down_proj") else GAIN


@pytest.mark.parametrize("name", VECTORS)
def test_vectors_cost_no_launches_of_their_own(
    name: str, checkpoint: Callable[..., Any], launches: Counter[str]
) -> None:
    base = load_model(EngineConfig(model=str(checkpoint("llama")), device="cpu", dtype="float32"))
    operands, counts = VECTORS[name]
    adapted(base, in_layer(("",)), operands)
    run(base)
    assert tuple(launches[f"{kind}_kernel"] for kind in ("shrink", "expand", "scale_in")) == counts
    assert sum(launches.values()) <= 8


def test_ia3_costs_an_expand_for_keys_and_values_and_one_launch_before_down_proj(
    checkpoint: Callable[..., Any], launches: Counter[str]
) -> None:
    base = load_model(EngineConfig(model=str(checkpoint("llama")), device="cpu", dtype="float32"))
    adapted(base, in_layer(("k_proj", "v_proj", "down_proj")), ia3)
    run(base)
    assert launches == {"expand_kernel": 1, "scale_in_kernel": 1}

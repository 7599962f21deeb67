"""Serving compiles a small, fixed set of Triton kernels: no batch geometry makes a new one.

Without a GPU: launches are caught, and Triton's own binder says which compiled kernel each would need.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter

import pytest

pytest.importorskip("triton")

CATCH = """
import random
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

backend, binders, keys = make_backend(GPUTarget("cuda", 90, 32)), {}, set()

def catch(kernel, *args, grid, warmup, **kwargs):
    if kernel not in binders:
        binders[kernel] = create_function_from_signature(kernel.signature, kernel.params, backend)
    _, specialization, options = binders[kernel](*args, debug=False, **kwargs)
    keys.add((kernel.fn.__name__, str(specialization), str(options)))

def report():
    print(*(name for name, *_ in keys))

JITFunction.run = catch
CPU, rng = torch.device("cpu"), random.Random(0)
"""

ATTENTION = """
from onebase.kernels.attention import AttentionBatch, AttentionOptions, PageCache
from onebase.kernels.attention_triton import TritonAttention
from onebase.kernels.pages import LayerShape, SlotLayout

shape = LayerShape(3, 64, torch.bfloat16, CPU)
layout = SlotLayout.of([shape] * 30, 16)
buffer = torch.zeros(2 * layout.nbytes, dtype=torch.uint8)
cache = PageCache.within(buffer, shape, 16, 2, layout.offsets[7], layout.nbytes)
body = TritonAttention(processors=132)
body.warm_up(9, cache, AttentionOptions(0.125))
report()

def attend(queries, lengths):
    pages = [[0] * -(-length // 16) for length in lengths]
    qkv = torch.zeros(sum(queries), 15, 64, dtype=torch.bfloat16)
    q, k, v = qkv.split([9, 3, 3], dim=1)
    body(q, k, v, cache, AttentionBatch.build(queries, lengths, pages, 16, CPU), AttentionOptions(0.125))

for count in range(1, 65):
    for pages in (1, 2, 3, 7, 15, 16, 17, 31, 32, 33, 48, 64):
        attend([1] * count, [pages * 16 - rng.randrange(16) for _ in range(count)])
for _ in range(200):
    lengths = [rng.randint(1, 900) for _ in range(rng.randint(1, 20))]
    attend([rng.choice((1, length, rng.randint(1, length))) for length in lengths], lengths)
report()
"""

MATMUL = """
from onebase.kernels.matmul_triton import TritonKernels
from onebase.kernels.plan import BatchPlan
from onebase.kernels.tables import Operands, ProgramTables, SiteShape

SITES = [SiteShape(64, 64)] * 20
GROUPS = ((0,), (1, 2, 3), (4, 5), (16,), (17, 18))
RANKS = (0, 1, 3, 16, 17, 33, 77)
tables = ProgramTables(torch.zeros(1 << 16, dtype=torch.bfloat16), SITES)
for handle in range(40):
    vectors = ({}, dict(gain=0), dict(gain=0, sine=0, group=16), dict(gain_in=0))[handle % 4]
    op = Operands(RANKS[handle % len(RANKS)], 1.0, 0, 0, add_out=0, **vectors)
    tables.install(handle, {**{site: op for site in range(19)}, 19: Operands(op.rank, 1.0, 0, 0, token=True)})
body = TritonKernels(tables)
body.warm_up(GROUPS)
report()

def apply(runs):
    plan = BatchPlan.from_runs(runs)
    x = torch.zeros(plan.num_rows, 64, dtype=torch.bfloat16)
    for group in GROUPS:
        body.scale_in(x.clone(), x, group[0], plan)
        body.expand_group([x.clone() for _ in group], body.shrink(x, group, plan), group, plan)
    body.token_low_rank(x, torch.zeros(plan.num_rows, dtype=torch.int64), 19, plan)

for _ in range(400):
    handles = rng.sample(range(40), rng.randint(1, 16))
    longest = rng.choice((1, 16, 50, 100))
    apply([(rng.randint(1, longest), tuple((h, 1.0) for h in {handle, rng.choice(handles)})) for handle in handles])
report()
"""


def compiled(program: str) -> tuple[Counter[str], Counter[str]]:
    """Distinct compiled kernels by the function's name: after warm_up, and after much serving."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-P", "-W", "ignore", "-c", CATCH + program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    warm, served = (Counter(line.split()) for line in done.stdout.splitlines())
    return warm, served


def test_attention_compiles_one_kernel_per_role() -> None:
    """Decoding, decoding in splits, prompts. All of them by warm_up."""
    warm, served = compiled(ATTENTION)
    assert warm == served == {"write_kernel": 1, "attend_kernel": 3, "reduce_kernel": 1}


def test_matmul_compiles_one_kernel_per_block_shape() -> None:
    """Tiles of 16, 32 and 64 rows, by rank blocks of 16, 32 and 64 but for scaled inputs; tiles of a few rows whatever
    the rank, but for expands beyond 64; expand has a twin for embeddings."""
    warm, served = compiled(MATMUL)
    assert warm == served == {
        "shrink_kernel": 9, "expand_kernel": 18, "shrink_rows_kernel": 1, "expand_rows_kernel": 4, "scale_in_kernel": 4,
    }  # fmt: skip

"""The Triton kernels compile for real GPUs, without one: the interpreter accepts more than the compiler does."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

PROGRAM = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from onebase.kernels import matmul_triton as kernels
from onebase.kernels.tiles import FEW_ROWS

target, dtype, shape = GPUTarget("cuda", int(sys.argv[1]), 32), sys.argv[2], sys.argv[3]
size, few, tall = 4 if dtype == "fp32" else 2, shape == "few", shape == "tall"
block_m = dict(few=FEW_ROWS, flat=16, tall=64)[shape]
splits, fields = 1 if tall else 4, dict(ALIGN=16 // size, FIELDS=9, TILE_FIELDS=8)
height = {} if few else dict(BLOCK_M=block_m, WIDE=False)
products = {kernels.shrink_kernel, kernels.expand_kernel}  # on tensor cores

def build(kernel, pointers, aligned_integers, integers, **constants):
    signature = pointers | dict.fromkeys((*aligned_integers, *integers), "i32") | dict.fromkeys(constants, "constexpr")
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    aligned = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in (*pointers, *aligned_integers)}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=aligned)
    compiled = triton.compile(source, target=target)
    assert compiled.metadata.shared <= 99 * 1024, compiled.metadata.shared
    assert ("mma" in compiled.asm["ptx"]) == (dtype != "fp32" and kernel in products)
    assert "ld.global.v4" in compiled.asm["ptx"] or ", 0x10," in compiled.asm["ptx"]  # whole vectors

common = dict(arena="*" + dtype, table="*i64", tiles="*i32")
common_of_parts = dict(arena="*" + dtype, table="*i64", parts="*i32")
build(
    kernels.shrink_rows_kernel if few else kernels.shrink_kernel,
    dict(x="*" + dtype, **(common_of_parts if few else common), sites="*i32", xa="*fp32"),
    ["x_stride", "in_features", "width"], ["n_sites", "packed_rows", "group_size"],
    BLOCK_R=16 if few else 128 // size, BLOCK_K=(512 if few else 128 if tall else 256) // size, SPLITS=splits,
    **height, **fields,
)
build(
    kernels.scale_in_kernel,
    dict(target="*" + dtype, x="*" + dtype, **common, tile_scales="*fp32"),
    ["target_stride", "x_stride", "in_features"], ["site", "n_sites"],
    BLOCK_M=block_m, BLOCK_N=4096 // block_m, **fields,
)
for token in (False, True):
    build(
        kernels.expand_rows_kernel if few else kernels.expand_kernel,
        dict(**{y: "*" + dtype for y in ("y0", "y1", "y2")}, **common, scales="*fp64", tile_scales="*fp32",
             source="*i64" if token else "*fp32"),
        [*(f"{name}{at}" for name in ("stride", "n") for at in range(3)), "member_stride", "split_stride", "width"],
        [*(f"{name}{at}" for name in ("site", "member") for at in range(3)), "n_sites", "maps"],
        BLOCK_N=512 // size if few else 128 if tall else 64, BLOCK_R=16 if few else 128 // size,
        SPLITS=1 if token else splits, TOKEN=token, **(dict(STAGES=3) if few else height), **fields,
    )
"""


def compile_for(capability: int, dtype: str, shape: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-P", "-W", "ignore", "-c", PROGRAM, str(capability), dtype, shape]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_decode_compiles_for_ampere() -> None:
    compile_for(80, "bf16", "few")


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["few", "flat", "tall"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("capability", [80, 90])
def test_every_configuration_compiles(capability: int, dtype: str, shape: str) -> None:
    compile_for(capability, dtype, shape)

"""The norm's kernel compiles for a real GPU, without one, and reads its rows in whole vectors."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

PROGRAM = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from onebase.kernels.fused_kernels import rms_norm_kernel as kernel

pointers, integers = ("x", "residual", "weight", "total", "out"), ("x_stride", "residual_stride", "width")
loads = {}
for adds in (False, True):
    constants = dict(ADDS=adds, ROUNDED=True, BLOCK_M=1, BLOCK_W=4096)
    signature = dict.fromkeys(pointers, "*bf16") | dict.fromkeys((*integers, "rows"), "i32")
    signature |= dict(eps="fp32", offset="fp32") | dict.fromkeys(constants, "constexpr")
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    aligned = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in (*pointers, *integers)}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 80, 32), options=dict(num_warps=8))
    assert "ld.global.v4" in compiled.asm["ptx"]
    loads[adds] = compiled.asm["ptx"].count("ld.global")
assert loads[True] > loads[False]  # of the residual
"""


def test_it_compiles_for_ampere() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-P", "-W", "ignore", "-c", PROGRAM]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]

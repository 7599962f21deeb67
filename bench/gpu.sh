#!/bin/sh
# All that needs a GPU: correctness, then figures. Each stage within 10 minutes; what a stage that is cut off has measured is stored.
# Needs torch, triton, transformers, numpy, psutil, safetensors; pytest and hypothesis for the tests. Not the HTTP stack.
#
#     bench/gpu.sh                       everything; JSON in bench/results/gpu
#     bench/gpu.sh correctness step      these stages
set -u
cd "$(dirname "$0")/.." || exit 1
PYTHON=${PYTHON:-python3}
OUT=${OUT:-bench/results/gpu}

mkdir -p build/gpu/onebase "$OUT"
for folder in adapters bench kernels serve; do ln -sfn "$PWD/$folder" "build/gpu/onebase/$folder"; done
export PYTHONPATH="$PWD/build/gpu" PYTHONSAFEPATH=1 TRITON_INTERPRET=0 HF_HUB_OFFLINE=1

status=0
stage() {
    case $1 in
    correctness)
        timeout 590 "$PYTHON" -m pytest -o addopts= -o filterwarnings=default --import-mode=importlib -q -m gpu \
            tests/kernels tests/serve/model/test_fused.py tests/serve/engine/test_graphs.py ;;
    *) timeout 590 "$PYTHON" -m onebase.bench.gpu "$1" --out "$OUT" ;;
    esac
}
for name in ${*:-correctness kernels step prefill tune lifecycle widths}; do
    echo "== $name"
    stage "$name" || { echo "== $name failed: exit status $?"; status=1; }
done
exit $status

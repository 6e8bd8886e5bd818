#!/usr/bin/env bash
# Whether what was installed works, without a GPU: which kernels of attention are there, the command compiles a cluster's
# run, and two steps on two CPU ranks.
set -euo pipefail

if [[ $(id -u) == 0 && -z ${ALLOW_ROOT:-} ]]; then
    echo "smoke_test: runs as root; the image shall not" >&2
    exit 1
fi
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cd "$scratch"

python3 - <<'PYTHON'
from importlib.metadata import PackageNotFoundError, version

import torch

from megatron_attn2d.attention.kernels import refusals
from megatron_attn2d.attention.kernels.base import Request

for package in ("torch", "megatron-core", "transformer-engine", "flash-attn-4", "apex", "megatron-attn2d"):
    try:
        print(f"{package} {version(package)}")
    except PackageNotFoundError:
        print(f"{package} is not installed")
for kernel, refused in refusals(Request("cuda", torch.bfloat16, head_dim=128, v_head_dim=128)).items():
    print(f"kernel {kernel}: {refused or 'found'}")
PYTHON
megatron-attn2d train "$repository/configs/runs/gpt3_175b_32k.yaml" "context_parallel.grid=[4, 4]" \
    --dry-run >dry-run.txt
grep -q -- '--hierarchical-context-parallel-sizes 4 4' dry-run.txt
OMP_NUM_THREADS=1 megatron-attn2d train "$repository/configs/runs/quickstart.yaml" parallelism.pipeline=1 \
    context_parallel.size=2 training.train_iters=2 optimizer.lr_warmup_iters=0 data.mock=true run.dir="$scratch/run"
[[ $(wc -l <"$scratch/run/metrics.jsonl") == 2 ]]
echo "smoke_test: passed"

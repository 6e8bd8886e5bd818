#!/usr/bin/env bash
# Installs this checkout with what reads data and FlashAttention-4, and what these need beyond the image: PyTorch and
# everything else that is there stays as it is.
set -euo pipefail

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
constraints=$(mktemp)
trap 'rm -f "$constraints"' EXIT
python3 -m pip list --format=freeze --exclude-editable >"$constraints"
# Megatron-Core as tested, and the compiler of FlashAttention-4 as that asks for it; images may bring others.
compiler='nvidia[-_]cutlass[-_]dsl[^=]*|quack[-_]kernels|apache[-_]tvm[-_]ffi|torch[-_]c[-_]dlpack[-_]ext'
sed -E -i "/^(megatron[-_]core|flash[-_]attn[-_]4|$compiler)==/d" "$constraints"
grep -E '^megatron-core==' "$repository/requirements.lock" >>"$constraints"
# NVIDIA's images pin packages through PIP_CONSTRAINT, some to versions that are not the installed ones.
PIP_CONSTRAINT='' python3 -m pip install --no-cache-dir --constraint "$constraints" \
    "${repository}[data,hopper]" "flash-attn-4[cu13]"

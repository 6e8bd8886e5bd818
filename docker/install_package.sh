#!/usr/bin/env bash
# Installs this checkout, and what it needs beyond the image: PyTorch and everything else that is there stays as it is.
set -euo pipefail

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
constraints=$(mktemp)
trap 'rm -f "$constraints"' EXIT
python3 -m pip list --format=freeze --exclude-editable >"$constraints"
# Megatron-Core as tested; images may bring another.
sed -i '/^megatron[-_]core==/d' "$constraints"
grep -E '^megatron-core==' "$repository/requirements.lock" >>"$constraints"
# NVIDIA's images pin packages through PIP_CONSTRAINT, some to versions that are not the installed ones.
PIP_CONSTRAINT='' python3 -m pip install --no-cache-dir --constraint "$constraints" "$repository"

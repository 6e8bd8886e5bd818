#!/usr/bin/env bash
# What eight GPUs of one host are to be asked, in nine minutes: all kinds of attention beside Transformer Engine,
# CUDA graphs at 4,096 tokens per GPU, a model of 2.7B's size at 32K, and decoding behind 1,048,576 tokens.
#
#   bash scripts/eight_gpus.sh OUT
#   RANKS=4 bash scripts/eight_gpus.sh OUT
#
# Whole steps of a million tokens take ten minutes each, and have commands of their own:
#
#   python benchmarks/benchmark_million.py --ranks 8 --out million --sections steps --steps-seq 1048576 --tensor 2 --budget 570
#   python benchmarks/benchmark_million.py --ranks 8 --out million --sections layers --seq 524288 1048576 --budget 570
#   megatron-attn2d train configs/runs/qwen3_8b_1m.yaml training.train_iters=2 optimizer.lr_warmup_iters=1 \
#       checkpoint.save=false checkpoint.save_interval=null
set -euo pipefail
out=${1:?usage: eight_gpus.sh OUT}
ranks=${RANKS:-8}
mkdir -p "$out"
benchmarks=$(dirname "${BASH_SOURCE[0]}")/../benchmarks
watched=$benchmarks/watched.py

# Runs the script $3 for at most $2 seconds with the arguments behind it; what it prints is in OUT/$1.log, too.
# A part that fails leaves the others their turn.
part() {
    local name=$1 seconds=$2 script=$3
    shift 3
    echo "== $name"
    python "$watched" "$seconds" python "$benchmarks/$script" "$@" 2>&1 | tee "$out/$name.log" || failed+=("$name")
}

failed=()
part attention 235 benchmark_attention.py --ranks "$ranks" --out "$out/attention" --budget 225 \
    --grids "${ranks}x1" "$((ranks / 2))x2" "2x$((ranks / 2))x1"
part graphs 130 benchmark_training.py --ranks "$ranks" --per-rank 4096 --steps 15 --timeout 32 --graphs none layer
part model 90 benchmark_training.py --ranks "$ranks" --seq 32768 --steps 10 --timeout 45 model.num_layers=32
part decode 85 benchmark_decode.py --ranks "$ranks" --tokens 1048576 --json "$out/decode.json"
if ((${#failed[@]})); then
    echo "failed: ${failed[*]}" >&2
    exit 1
fi

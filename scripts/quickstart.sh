#!/usr/bin/env bash
# From a bare checkout to a GPT that learns, on this machine's CPU: sets up .venv, builds a data set from the sources of
# Python's standard library, pretrains with attention2d, repeats the first steps with ring attention from the same seed,
# shows both losses side by side and as a picture, and lets the model continue a text. Minutes, not hours; no GPU.
set -euo pipefail

usage() {
    cat <<'USAGE'
usage: bash scripts/quickstart.sh [options] [key.sub=value ...]
  --tensor N     tensor-parallel ranks (default 1)
  --pipeline N   pipeline stages (default 2)
  --context N    context-parallel ranks, laid out as a grid (default 4: 2 rows x 2 columns)
  --steps N      steps to train (default 60)
  --compare N    of these, how many to repeat with ring attention (default 10)
  key.sub=value  any key of configs/runs/quickstart.yaml
USAGE
}

tensor=1 pipeline=2 context=4 steps=60 compare=10 overrides=()
while (($#)); do
    case $1 in
        --tensor | --pipeline | --context | --steps | --compare)
            if [[ ! ${2:-} =~ ^[1-9][0-9]{0,6}$ ]]; then
                echo "quickstart: $1 takes a positive number, not '${2:-}'" >&2
                exit 2
            fi
            printf -v "${1#--}" %s "$2"
            shift 2
            ;;
        -h | --help) usage && exit ;;
        [!-]*=*) overrides+=("$1") && shift ;;
        *) echo "quickstart: unknown argument '$1'" >&2 && usage >&2 && exit 2 ;;
    esac
done

# shellcheck source=scripts/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup_venv
cd "$repo_root"

out=runs/quickstart
chunks=$((2 * context)) # of the zigzag: the sequence is a multiple of them
common=(
    "parallelism.tensor=$tensor" "parallelism.pipeline=$pipeline" "context_parallel.size=$context"
    "training.seq_length=$(((512 + chunks - 1) / chunks * chunks))"
    "training.train_iters=$steps" "optimizer.lr_decay_iters=$((steps > 60 ? steps : 60))" "${overrides[@]}"
)

train() { # MODE [key.sub=value ...]
    rm -rf "${out:?}/$1"
    "$venv/bin/megatron-attn2d" train configs/runs/quickstart.yaml "${common[@]}" \
        "context_parallel.mode=$1" "run.name=$1" "run.dir=$out/$1" "${@:2}"
}

echo "== $steps steps with attention2d: tensor $tensor x pipeline $pipeline x context $context"
train attention2d checkpoint.save=true
echo "== the first $((compare < steps ? compare : steps)) steps again, with ring attention"
train ring "training.exit_interval=$compare"
echo "== both, from the same seed"
"$venv/bin/megatron-attn2d" plot "$out/attention2d" "$out/ring" -o "$out/loss.png"

echo "== how it continues a text after $steps steps, on the same ranks"
"$venv/bin/megatron-attn2d" generate "$out/attention2d" --prompt "def __init__(self, " \
    --max-tokens 160 --temperature 0.9 --top-p 0.95 --seed 1

#!/usr/bin/env bash
# Which of Megatron's arguments change a training in which kind of model: about 1,500 trainings of two steps on one CPU
# rank, half an hour to an hour on two cores; writes megatron_attn2d/config/argument_effects.json anew. With names it
# tries those and writes nothing.
#   bash scripts/argument_sweep.sh
#   bash scripts/argument_sweep.sh use_rope_scaling reset_position_ids
set -euo pipefail

# shellcheck source=scripts/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup_venv
cd "$repo_root"
exec "$venv/bin/python" -m tests.megatron.argument_sweep "$@"

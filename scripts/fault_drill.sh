#!/usr/bin/env bash
# The fault drills that are too long for every test run; prints a table and fails if one of them does.
#   bash scripts/fault_drill.sh                     all of them
#   bash scripts/fault_drill.sh sigterm=5 kill=5    some, and how many of each
#
#   determinism  two runs of 20 steps of each mode on 8 ranks, CP4 with TP2 or PP2 and CP2 with both, bit for bit
#   resume       20 steps of each mode on 8 ranks, CP2 with TP2 and PP2, stopped half-way and resumed: bit for bit
#   sigterm      20 SIGTERMs at random moments of training
#   kill         20 times kill -9 of a rank at a random moment of a save
#   hangs        SIGSTOP of a rank in each exchange of a step of training, where groups wait for 15 s (hangs=15)
#   soak         2,000 steps on 8 ranks: memory, file handles, threads, process groups
#   grids        1,000 grids built, used and destroyed in one process
#
# It takes CPU ranks alone: 8 GiB of memory, 1 GiB of disk under TMPDIR, and on 2 busy cores about an hour. Groups that
# wait for too short a time on a machine that does other work end a job by themselves: give hangs a larger number there.
set -euo pipefail

# shellcheck source=scripts/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup_venv
cd "$repo_root"
exec "$venv/bin/python" -m tests.guarantees.drill "$@"

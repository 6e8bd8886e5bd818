#!/usr/bin/env bash
# Sets up .venv if need be and runs the tests; arguments go to pytest:
#   bash scripts/test.sh -k layout
set -euo pipefail

# shellcheck source=scripts/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup_venv
cd "$repo_root"
# Ranks are processes: a thread each, or they fight over the cores.
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} exec "$venv/bin/python" -m pytest "$@"

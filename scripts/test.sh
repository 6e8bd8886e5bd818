#!/usr/bin/env bash
# Sets up .venv if need be and runs the tests; arguments go to pytest:
#   bash scripts/test.sh             all of them, in two processes
#   bash scripts/test.sh -k layout
set -euo pipefail

# shellcheck source=scripts/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup_venv
cd "$repo_root"
# Two processes: many tests wait, or keep one core busy. A file stays whole, as its tests share trainings; files come in
# the order of tests/conftest.py.
(($#)) || set -- -n 2 --dist loadfile --no-loadscope-reorder
# Ranks are processes: a thread each, or they fight over the cores.
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} exec "$venv/bin/python" -m pytest "$@"

#!/usr/bin/env bash
# Makes .venv at the repository's root: a fitting Python, the dependencies of requirements.lock, this package (editable).
#
#   bash scripts/setup.sh          once, by hand; quickstart.sh and test.sh call it themselves
#   PYTHON=/path/to/python ...     takes that interpreter instead of searching
#
# A stamp in .venv says what was installed. Same stamp: nothing to do. Older stamp: the difference is installed. No stamp:
# an install was interrupted, which can leave half-written packages behind, so the environment is made anew.

repo_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$repo_root/.venv

# Whether $1 runs and is a Python that the locked packages have wheels for. Running it is the test: the shims of pyenv
# and asdf are on the PATH even when the version behind them is not there, and Debian's python3 may lack ensurepip.
fits() {
    "$1" -I -c 'import ensurepip, ssl, sys, venv; sys.exit(sys.version_info[:2] not in {(3, 12), (3, 13)})' \
        >/dev/null 2>&1
}

# Prints the interpreter to use; fails when there is none.
find_python() {
    local candidate
    if [[ -n ${PYTHON:-} ]]; then
        fits "$PYTHON" && echo "$PYTHON"
        return
    fi
    for candidate in python3.13 python3.12 python3 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[23]*/bin/python3; do
        if fits "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

create_venv() {
    local python
    rm -rf "$venv"
    if python=$(find_python); then
        "$python" -m venv "$venv"
    elif [[ -n ${PYTHON:-} ]]; then
        echo "setup: PYTHON=$PYTHON is not a working Python 3.12 or 3.13 with venv and ensurepip" >&2
        return 1
    elif command -v uv >/dev/null; then
        uv venv --quiet --seed --python ">=3.12,<3.14" "$venv"
    else
        echo "setup: no Python 3.12 or 3.13 found; install one (apt install python3.12-venv, pyenv install 3.12)" \
            "or uv, and run this again" >&2
        return 1
    fi
}

# What the environment should hold, as one line.
wanted_stamp() {
    (cd "$repo_root" && cat requirements.lock pyproject.toml setup.py | cksum && echo "$repo_root") | tr '\n' ' '
}

setup_venv() {
    local stamp=$venv/.installed wanted
    wanted=$(wanted_stamp) || return 1
    if [[ -f $stamp ]] && "$venv/bin/python" -c '' 2>/dev/null; then
        [[ $(<"$stamp") == "$wanted" ]] && return
    else
        create_venv || return 1
    fi
    rm -f "$stamp"
    echo "setup: installing into .venv (the first time several GB: PyTorch comes with its CUDA libraries)" >&2
    local pip=("$venv/bin/python" -m pip --disable-pip-version-check --no-input install)
    (set -o pipefail && "${pip[@]}" -r "$repo_root/requirements.lock" | sed '/^Requirement already/d') >&2 || return 1
    # No build isolation: the build backend is in the lock too, so nothing unpinned is fetched.
    "${pip[@]}" --quiet --no-deps --no-build-isolation -e "$repo_root" >&2 || return 1
    echo "$wanted" >"$stamp"
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
    set -euo pipefail
    setup_venv
    echo "setup: .venv is ready ($("$venv/bin/python" --version), $venv)"
fi

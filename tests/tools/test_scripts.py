"""The shell scripts, run for real over stub interpreters: nothing is installed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = ("bash", "cat", "cksum", "cp", "dirname", "mkdir", "rm", "sed", "tr", "env", "chmod")

# Stands for an interpreter that fits: makes environments that hold a copy of itself, and logs what else it is asked.
PYTHON = """#!/usr/bin/env bash
if [[ $1 == -m && $2 == venv ]]; then
    mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && echo "venv by ${0##*/}" >>"$LOG"
elif [[ $1 == -m ]]; then
    echo "${*:2}" >>"$LOG"
    [[ -z ${FAIL:-} || "$*" != *"$FAIL"* ]]
fi
"""
BROKEN_SHIM = '#!/usr/bin/env bash\necho "pyenv: $0: command not found" >&2\nexit 127\n'
TOO_OLD = "#!/usr/bin/env bash\nexit 1\n"
UV = """#!/usr/bin/env bash
echo "uv $*" >>"$LOG"
venv=${*: -1}
mkdir -p "$venv/bin" && cp "$PYTHON_STUB" "$venv/bin/python"
"""


class Sandbox:
    """A checkout with our scripts, and a PATH with nothing but the tools that they use."""

    def __init__(self, root: Path):
        self.repo, self.path, self.home = root / "check out", root / "path", root / "home"
        for folder in (self.repo, self.path, self.home):
            folder.mkdir()
        for tool in TOOLS:
            (self.path / tool).symlink_to(shutil.which(tool))
        for name in ("scripts", ".ci", "configs"):
            shutil.copytree(ROOT / name, self.repo / name)
        for name in ("pyproject.toml", "setup.py", "requirements.lock"):
            shutil.copy(ROOT / name, self.repo)
        self.log = root / "log"
        self.log.touch()
        self.write(root / "python-stub", PYTHON)
        self.environ = {
            "PATH": str(self.path),
            "HOME": str(self.home),
            "LOG": str(self.log),
            "PYTHON_STUB": str(root / "python-stub"),
        }

    def write(self, path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def on_path(self, **stubs: str) -> None:
        for name, text in stubs.items():
            self.write(self.path / name.replace("_", "."), text)

    def run(self, script: str, *args: str, **environ: str) -> subprocess.CompletedProcess[str]:
        command = [str(self.path / "bash"), str(self.repo / script), *args]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, env=self.environ | environ)

    def logged(self) -> list[str]:
        lines = self.log.read_text().splitlines()
        self.log.write_text("")
        return lines


@pytest.fixture
def sandbox(tmp_path):
    return Sandbox(tmp_path)


@pytest.mark.parametrize(
    ("stubs", "chosen"),
    [
        ({"python3_13": PYTHON, "python3_12": PYTHON, "python3": PYTHON}, "python3.13"),
        ({"python3_12": PYTHON, "python3": TOO_OLD}, "python3.12"),
        ({"python3_13": BROKEN_SHIM, "python3_12": PYTHON}, "python3.12"),
        ({"python3_13": BROKEN_SHIM, "python3_12": BROKEN_SHIM, "python3": PYTHON}, "python3"),
    ],
)
def test_finds_an_interpreter_that_runs_on_the_path(sandbox, stubs, chosen):
    sandbox.on_path(**stubs)
    assert sandbox.run("scripts/setup.sh").returncode == 0
    assert sandbox.logged()[0] == f"venv by {chosen}"


@pytest.mark.parametrize("variable", ["PYENV_ROOT", "HOME"])
def test_finds_an_interpreter_of_pyenv_behind_broken_shims(sandbox, variable, tmp_path):
    sandbox.on_path(python3_12=BROKEN_SHIM, python3=TOO_OLD)
    pyenv = tmp_path / "pyenv" if variable == "PYENV_ROOT" else sandbox.home / ".pyenv"
    sandbox.write(pyenv / "versions" / "3.12.1" / "bin" / "python3", PYTHON)
    sandbox.write(pyenv / "versions" / "3.9.18" / "bin" / "python3", TOO_OLD)
    environ = {"PYENV_ROOT": str(pyenv)} if variable == "PYENV_ROOT" else {}
    assert sandbox.run("scripts/setup.sh", **environ).returncode == 0
    assert sandbox.logged()[0] == "venv by python3"


def test_takes_one_from_uv_when_there_is_no_other(sandbox):
    sandbox.on_path(python3=TOO_OLD, uv=UV)
    assert sandbox.run("scripts/setup.sh").returncode == 0
    assert sandbox.logged()[0] == f"uv venv --quiet --seed --python >=3.12,<3.14 {sandbox.repo}/.venv"


def test_without_any_says_in_one_line_what_to_install(sandbox):
    sandbox.on_path(python3_12=BROKEN_SHIM, python3=TOO_OLD)
    for script in ("scripts/setup.sh", "scripts/test.sh", "scripts/quickstart.sh", ".ci/run"):
        result = sandbox.run(script)
        assert result.returncode == 1
        assert result.stdout == ""
        assert result.stderr == (
            "setup: no Python 3.12 or 3.13 found; install one (apt install python3.12-venv, pyenv install 3.12) or uv, "
            "and run this again\n"
        )


def test_an_interpreter_asked_for_is_taken_or_refused_by_name(sandbox):
    sandbox.on_path(python3_13=PYTHON, mine=PYTHON, old=TOO_OLD)
    assert sandbox.run("scripts/setup.sh", PYTHON=str(sandbox.path / "mine")).returncode == 0
    assert sandbox.logged()[0] == "venv by mine"
    shutil.rmtree(sandbox.repo / ".venv")
    result = sandbox.run("scripts/setup.sh", PYTHON="old")
    assert (result.returncode, result.stderr) == (
        1,
        "setup: PYTHON=old is not a working Python 3.12 or 3.13 with venv and ensurepip\n",
    )


def test_a_real_interpreter_is_judged_by_its_version(sandbox):
    script = f'source "{sandbox.repo}/scripts/setup.sh"; fits "{sys.executable}"'
    result = subprocess.run(["bash", "-c", script], env={"PATH": os.environ["PATH"]}, timeout=60)
    assert (result.returncode == 0) == (sys.version_info[:2] in {(3, 12), (3, 13)})


INSTALLS = ["--disable-pip-version-check --no-input install -r", "--quiet --no-deps --no-build-isolation -e"]


def installs(logged):
    return [sum(part in line for line in logged) for part in INSTALLS]


def test_a_second_run_reuses_the_environment(sandbox):
    sandbox.on_path(python3_12=PYTHON)
    assert sandbox.run("scripts/setup.sh").returncode == 0
    assert installs(sandbox.logged()) == [1, 1]
    assert sandbox.run("scripts/setup.sh").returncode == 0
    assert sandbox.logged() == []


@pytest.mark.parametrize("file", ["requirements.lock", "pyproject.toml"])
def test_a_changed_dependency_is_installed_into_the_same_environment(sandbox, file):
    sandbox.on_path(python3_12=PYTHON)
    sandbox.run("scripts/setup.sh")
    sandbox.logged()
    with (sandbox.repo / file).open("a") as changed:
        changed.write("# changed\n")
    assert sandbox.run("scripts/setup.sh").returncode == 0
    logged = sandbox.logged()
    assert installs(logged) == [1, 1]
    assert not [line for line in logged if line.startswith("venv")]


def test_an_interrupted_install_is_repaired_by_the_next_run(sandbox):
    sandbox.on_path(python3_12=PYTHON)
    for failing in INSTALLS:
        assert sandbox.run("scripts/setup.sh", FAIL=failing).returncode == 1
        sandbox.logged()
        (sandbox.repo / ".venv" / "half-written").touch()
        assert sandbox.run("scripts/setup.sh").returncode == 0
        assert sandbox.logged()[0] == "venv by python3.12"
        assert not (sandbox.repo / ".venv" / "half-written").exists()
        with (sandbox.repo / "requirements.lock").open("a") as changed:
            changed.write("# changed\n")


def test_an_environment_whose_interpreter_has_gone_is_made_anew(sandbox):
    sandbox.on_path(python3_12=PYTHON)
    sandbox.run("scripts/setup.sh")
    sandbox.logged()
    (sandbox.repo / ".venv" / "bin" / "python").unlink()
    assert sandbox.run("scripts/setup.sh").returncode == 0
    assert sandbox.logged()[0] == "venv by python3.12"


def test_test_sh_hands_its_arguments_to_pytest(sandbox):
    sandbox.on_path(python3_12=PYTHON)
    assert sandbox.run("scripts/test.sh", "-k", "layout and not slow").returncode == 0
    assert sandbox.logged()[-1] == "pytest -k layout and not slow"
    assert sandbox.run("scripts/test.sh", FAIL="pytest").returncode == 1


@pytest.mark.parametrize("failing", [None, "ruff", "mypy", "shellcheck", "pytest"])
def test_ci_fails_when_any_check_fails_and_still_runs_the_tests(sandbox, failing):
    sandbox.on_path(python3_12=PYTHON)
    sandbox.run("scripts/setup.sh")
    for tool in ("ruff", "mypy", "shellcheck"):
        sandbox.write(sandbox.repo / ".venv" / "bin" / tool, f"#!/usr/bin/env bash\nexit {int(tool == failing)}\n")
    sandbox.logged()
    result = sandbox.run(".ci/run", FAIL="pytest" if failing == "pytest" else "")
    assert result.returncode == (0 if failing is None else 1)
    assert sandbox.logged() == ["pytest -n 2 --dist loadfile --no-loadscope-reorder"]


CLI = '#!/usr/bin/env bash\nprintf "%s|" "$@" >>"$LOG"; echo >>"$LOG"\n'


def test_quickstart_trains_with_both_attentions_plots_and_generates(sandbox):
    sandbox.on_path(python3_12=PYTHON)
    sandbox.run("scripts/setup.sh")
    sandbox.write(sandbox.repo / ".venv" / "bin" / "megatron-attn2d", CLI)
    sandbox.logged()
    result = sandbox.run("scripts/quickstart.sh", "--tensor", "2", "--context", "3", "--steps", "90", "data.dir=/a b")
    assert result.returncode == 0, result.stderr
    attention2d, ring, plot, text = sandbox.logged()
    sizes = "parallelism.tensor=2|parallelism.pipeline=2|context_parallel.size=3|"
    sizes += "training.seq_length=516|training.train_iters=90|"
    for run, mode in ((attention2d, "attention2d"), (ring, "ring")):
        assert run.startswith(f"train|configs/runs/quickstart.yaml|{sizes}optimizer.lr_decay_iters=90|data.dir=/a b|")
        assert f"context_parallel.mode={mode}|run.name={mode}|run.dir=runs/quickstart/{mode}|" in run
    assert ring.endswith("training.exit_interval=10|")
    assert attention2d.endswith("|checkpoint.save=true|")
    assert text.startswith("generate|runs/quickstart/attention2d|--prompt|")
    assert plot == "plot|runs/quickstart/attention2d|runs/quickstart/ring|-o|runs/quickstart/loss.png|"


@pytest.mark.parametrize("args", [["--tensor"], ["--tensor", "two"], ["--steps", "0"], ["--gpus", "2"], ["steps"]])
def test_quickstart_refuses_what_it_does_not_know_before_installing(sandbox, args):
    sandbox.on_path(python3_12=PYTHON)
    result = sandbox.run("scripts/quickstart.sh", *args)
    assert result.returncode == 2
    assert args[0] in result.stderr
    assert sandbox.logged() == []


def test_quickstart_explains_itself(sandbox):
    result = sandbox.run("scripts/quickstart.sh", "--help")
    assert result.returncode == 0
    assert "--pipeline N" in result.stdout


def test_shellcheck_is_content():
    scripts = [*ROOT.glob("scripts/**/*.sh"), ROOT / ".ci" / "run"]
    shellcheck = Path(sys.executable).parent / "shellcheck"
    result = subprocess.run([shellcheck, "-x", *scripts], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert result.returncode == 0, result.stdout


def test_the_lock_pins_everything_and_names_no_host():
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    requirements = [line for line in lines if line and not line.lstrip().startswith("#")]
    assert all("==" in line and "://" not in line and " @ " not in line for line in requirements)
    pinned = {line.partition("==")[0] for line in requirements}
    assert {"torch", "megatron-core", "pytest", "ruff", "mypy", "setuptools"} <= pinned

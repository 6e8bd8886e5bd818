"""The image's recipe, as far as it goes without an engine: a linter, and each step's script over stub commands."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
BIN = Path(sys.executable).parent
TOOLS = ("bash", "cat", "dirname", "grep", "mktemp", "rm", "sed")
PYTHON = """#!/bin/bash
echo "NVTE_CUDA_ARCHS=${NVTE_CUDA_ARCHS:-} TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-} $*" >>"$LOG"
case "$*" in
    *"pip list"*)
        printf '%s\\n' torch==2.13.0a0+nv26.6 megatron-core==0.12.0 numpy==1.26.4 nvidia-cutlass-dsl-libs-base==4.2.0 \\
            flash_attn==2.7.4 quack_kernels==0.1.0 ;;
    *--constraint*) echo "PIP_CONSTRAINT=$PIP_CONSTRAINT" >>"$LOG"; cat "$6" >>"$LOG" ;;
esac
"""
LOGGED = '#!/bin/bash\necho "${0##*/} $*" >>"$LOG"\n'


@pytest.fixture
def bare(tmp_path):
    """A machine with a few tools and stubs: run(script, *args) -> exit code, lines logged, errors."""
    (tmp_path / "bin").mkdir()
    for tool in TOOLS:
        (tmp_path / "bin" / tool).symlink_to(str(shutil.which(tool)))

    def stub(name, text):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)

    stub("python3", PYTHON)
    for name in ("useradd", "install"):
        stub(name, LOGGED)
    stub("getent", '#!/bin/bash\n[[ $2 == 1000 ]] && echo "ubuntu:x:1000:1000::/home/ubuntu:/bin/bash"\n')

    def run(script, *args):
        log = tmp_path / "log"
        log.write_text("")
        environ = {"PATH": str(tmp_path / "bin"), "LOG": str(log), "PIP_CONSTRAINT": "/etc/pip/constraint.txt"}
        result = subprocess.run([DOCKER / script, *args], env=environ, capture_output=True, text=True, timeout=60)
        return result.returncode, log.read_text().splitlines(), result.stderr

    return run


def test_hadolint_is_content():
    result = subprocess.run([BIN / "hadolint", DOCKER / "Dockerfile"], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout


def test_hadolint_would_not_be_content(tmp_path):
    (tmp_path / "Dockerfile").write_text("FROM ubuntu\nRUN cd /tmp && sudo ls\n")
    result = subprocess.run([BIN / "hadolint", tmp_path / "Dockerfile"], capture_output=True, text=True, timeout=60)
    assert result.returncode != 0


def test_shellcheck_is_content():
    result = subprocess.run([BIN / "shellcheck", *DOCKER.glob("*.sh")], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout


def test_every_step_is_a_script_that_is_there_and_the_last_user_is_not_root():
    text = (DOCKER / "Dockerfile").read_text()
    steps = re.findall(r"^RUN /opt/megatron_attn2d/docker/(\S+)", text, re.M)
    assert len(steps) == text.count("\nRUN ") == 4
    assert all(os.access(DOCKER / step, os.X_OK) for step in steps)
    assert re.findall(r"^USER (.*)$", text, re.M) == ["${USER_ID}"]
    assert text.index("USER $") < text.index("RUN /opt/megatron_attn2d/docker/smoke_test.sh")
    copied = re.findall(r"^COPY (\S+) ", text, re.M)
    assert all((ROOT / path).exists() for path in copied)


def test_extensions_are_kept_or_built_at_a_revision(bare):
    assert bare("install_extensions.sh", "", "", "80;90") == (0, [], "")
    code, (engine, apex), _ = bare("install_extensions.sh", "v2.4", "25.04", "80;90;100")
    assert code == 0
    pip = "-m pip install --no-cache-dir --no-build-isolation --no-deps git+https://github.com/NVIDIA"
    assert engine == f"NVTE_CUDA_ARCHS=80;90;100 TORCH_CUDA_ARCH_LIST= {pip}/TransformerEngine.git@v2.4"
    assert apex == f"NVTE_CUDA_ARCHS= TORCH_CUDA_ARCH_LIST=8.0;9.0;10.0 {pip}/apex.git@25.04"


@pytest.mark.parametrize("revision", ["-e .", "v2 4", "$(id)", "--upgrade"])
def test_a_revision_is_a_name(bare, revision):
    code, logged, error = bare("install_extensions.sh", "", revision, "80")
    assert (code, logged) == (2, [])
    assert f"'{revision}' is no tag, branch or commit" in error


def test_the_package_is_installed_without_touching_the_images_torch(bare):
    code, logged, error = bare("install_package.sh")
    assert (code, error) == (0, "")
    assert logged[1].endswith(f" {ROOT}[data,hopper] flash-attn-4[cu13]")
    locked = re.search(r"^megatron-core==.*$", (ROOT / "requirements.lock").read_text(), re.M)
    assert logged[2:] == ["PIP_CONSTRAINT=", "torch==2.13.0a0+nv26.6", "numpy==1.26.4", "flash_attn==2.7.4", locked[0]]


def test_the_user_is_made_unless_the_image_has_that_number(bare):
    assert bare("create_user.sh", "1000") == (0, ["install -d -o 1000 /workspace/run"], "")
    made = "useradd --create-home --uid 4711 --shell /bin/bash attn2d"
    assert bare("create_user.sh", "4711") == (0, [made, "install -d -o 4711 /workspace/run"], "")


@pytest.mark.parametrize("user", ["0", "root", "-1", "1 2"])
def test_root_is_no_user_of_the_image(bare, user):
    code, logged, error = bare("create_user.sh", user)
    assert (code, logged) == (2, [])
    assert "must be a positive number" in error


def test_the_smoke_test_passes_on_this_installation():
    environ = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}", "ALLOW_ROOT": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run([DOCKER / "smoke_test.sh"], env=environ, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "smoke_test: passed"
    assert "transformer-engine" in result.stdout
    assert "kernel triton: found\nkernel reference: found\n" in result.stdout


@pytest.mark.skipif(os.getuid() != 0, reason="runs as another user")
def test_the_smoke_test_refuses_root():
    environ = {name: value for name, value in os.environ.items() if name != "ALLOW_ROOT"}
    result = subprocess.run([DOCKER / "smoke_test.sh"], env=environ, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (1, "smoke_test: runs as root; the image shall not\n")

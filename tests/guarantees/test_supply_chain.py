"""What is installed is what is pinned, nothing pinned is known to be vulnerable; what of a checkpoint may run code."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.megatron.runs import arguments, train
from tests.pool import RankPool

ROOT = Path(__file__).parents[2]


def check_pins(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "scripts" / "check_pins.py", *args]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=60)


def test_no_pin_is_known_to_be_vulnerable() -> None:
    result = check_pins()
    assert result.returncode == 0, result.stderr
    pins, advisories = (int(word) for word in result.stdout.split() if word.isdecimal() and word != "0")
    assert pins > 100
    assert advisories >= 60


@pytest.mark.parametrize(
    ("pin", "affected"),
    [
        ("torch==2.5.1", "CVE-2025-32434"),
        ("torch==2.5.1 ; sys_platform == 'linux'", "CVE-2025-32434"),
        ("PyYAML==5.3.1", "CVE-2020-14343"),
        ("protobuf==6.30.2", "CVE-2025-4565"),
        ("protobuf==6.31.1", "CVE-2026-0994"),
        ("protobuf==6.33.5", None),
        ("torch==2.6.0+cu124", "CVE-2026-24747"),
        ("torch==2.13.0+cu130", None),
        ("transformers==5.0.0rc2", "CVE-2026-1839"),
    ],
)
def test_a_vulnerable_pin_fails_with_its_name(pin: str, affected: str | None, tmp_path: Path) -> None:
    (tmp_path / "requirements.lock").write_text(f"einops==0.8.2\n    # via x\n{pin}\n")
    result = check_pins(tmp_path / "requirements.lock")
    assert bool(result.returncode) == (affected is not None)
    assert (affected or "") in result.stderr


@pytest.mark.parametrize(
    ("lock", "advisories", "message"),
    [
        ("torch>=2.6\n", "torch<2  X: y; record https://z\n", "'torch>=2.6' is not pinned; write name==version"),
        ("torch==2.6\n", "torch <2 X: y; record https://z\n", "line 1: not an advisory; write 'name<1.2,>=1.0  ID"),
        ("torch==2.6\n", "\ntorch<2\n", "line 2: not an advisory; write 'name<1.2,>=1.0  ID: what; record https://so"),
        ("torch==2.6\n", "torch<2  X: y\n", "line 1: not an advisory; write 'name<1.2,>=1.0  ID"),
        ("torch==2.6\n", "torch<two  X: y; record https://z\n", "line 1: not an advisory; write 'name<1.2,>=1.0"),
    ],
)
def test_what_can_not_be_compared_fails(lock: str, advisories: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "lock").write_text(lock)
    (tmp_path / "advisories").write_text(advisories)
    result = check_pins(tmp_path / "lock", tmp_path / "advisories")
    assert result.returncode == 1
    assert message in result.stderr


def test_both_commands_install_the_lock_and_nothing_else() -> None:
    for command in ("quickstart.sh", "test.sh"):
        lines = (ROOT / "scripts" / command).read_text().splitlines()
        assert "setup_venv" in lines
        assert not any("pip install" in line for line in lines if not line.startswith("#"))
    setup = (ROOT / "scripts" / "setup.sh").read_text()
    assert [line.strip() for line in setup.splitlines() if '"${pip[@]}"' in line] == [
        '(set -o pipefail && "${pip[@]}" -r "$repo_root/requirements.lock" '
        "| sed '/^Requirement already/d') >&2 || return 1",
        '"${pip[@]}" --quiet --no-deps --no-build-isolation -e "$repo_root" >&2 || return 1',
    ]


@pytest.mark.skipif(not (ROOT / ".venv" / ".installed").exists(), reason="this installation was not made by setup.sh")
def test_what_is_installed_is_the_lock() -> None:
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "freeze", "--all", "--exclude-editable"],
        capture_output=True,
        text=True,
        check=True,
    )
    pinned = {line.partition(" ")[0].lower() for line in (ROOT / "requirements.lock").read_text().splitlines()}
    installed = {line.lower().replace("_", "-") for line in listed.stdout.splitlines() if "==" in line}
    assert {pin for pin in installed if not pin.startswith("pip==")} <= {pin.replace("_", "-") for pin in pinned}


TRUSTED = {
    (".metadata", "pickle.load in torch/distributed/checkpoint/filesystem.py"),
    (
        "an object in a .distcp file",
        "torch.load(weights_only=False) in torch/distributed/checkpoint/default_planner.py",
    ),
}
"""What upstream unpickles without a limit, as docs/guarantees.md says: arguments and random states are objects."""
LIMITED = ("a tensor in a .distcp file", "torch.load(weights_only=True) in torch/distributed/checkpoint/filesystem.py")


def resume_watched(rank: int, args: list[str]) -> set[tuple[str, str]]:
    """What is read of a checkpoint with pickle, and how."""
    from megatron_attn2d.training import pretrain_gpt

    found: set[tuple[str, str]] = set()

    def watched(name: str, function: Any) -> Any:
        def load(file: Any, *args: Any, **kwargs: Any) -> Any:
            caller = sys._getframe(1).f_code.co_filename.rpartition("site-packages/")[2]
            default = "" if function is unpickle else "(weights_only=True)"
            how = f"(weights_only={kwargs['weights_only']})" if "weights_only" in kwargs else default
            kind = "a tensor" if type(file).__name__ == "_ReaderView" else "an object"
            what = Path(file.name).name if isinstance(getattr(file, "name", 0), str) else f"{kind} in a .distcp file"
            found.add((what, f"{name}{how} in {caller}"))
            return function(file, *args, **kwargs)

        return load

    unpickle = pickle.load
    with (
        mock.patch.object(torch, "load", watched("torch.load", torch.load)),
        mock.patch.object(pickle, "load", watched("pickle.load", unpickle)),
    ):
        pretrain_gpt.main(args)
    return found


def test_tensors_are_loaded_with_weights_only_and_nothing_else_is_unpickled_than_the_readme_says(
    pool: RankPool, tmp_path: Path
) -> None:
    options = {"mock_data": True, "num_layers": 1, "train_iters": 2}
    train(pool, 1, tmp_path / "run", save=tmp_path / "saved", exit_interval=1, **options)
    resumed = arguments(run_dir=tmp_path / "run", load=tmp_path / "saved", **options)
    assert pool.run(resume_watched, 1, resumed) == [TRUSTED | {LIMITED}]

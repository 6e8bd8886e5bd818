"""What is installed is what is pinned, nothing pinned is known to be vulnerable, and nothing loaded runs code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

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

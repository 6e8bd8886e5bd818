"""The YAMLs that come with the package: found from any folder, listed, copied, and in a wheel."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_attn2d import cli
from megatron_attn2d.config import load_run, shipped

ROOT = Path(__file__).parents[2]
SHIPPED = sorted(path.relative_to(ROOT / "configs").as_posix() for path in ROOT.glob("configs/*/*.yaml"))
OWN = """\
extends: [models/llama_8b.yaml, clusters/h100.yaml]
training: {seq_length: 8192, global_batch_size: 8, train_iters: 10}
optimizer: {lr: 1.0e-4}
data: {mock: true}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_they_are_listed_and_found_from_any_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["configs"]) == 0
    assert capsys.readouterr().out.split() == SHIPPED
    (folder / "own.yaml").write_text(OWN)
    assert load_run("own.yaml").model.num_layers == 32
    assert load_run("runs/quickstart.yaml").run.name == "quickstart"
    (folder / "models").mkdir()
    (folder / "models" / "llama_8b.yaml").write_text("extends: models/llama_8b.yaml\nmodel: {num_layers: 2}\n")
    assert load_run("own.yaml").model.num_layers == 2, "the user's file wins, and extends ours"


def test_a_copied_run_is_a_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["configs", "runs/llama_8b_32k.yaml", "--copy", "mine"]) == 0
    assert "mine/runs/llama_8b_32k.yaml" in capsys.readouterr().out.split()
    assert "models/llama.yaml" in shipped.with_parents(["runs/llama_8b_32k.yaml"]), "what it extends comes along"
    assert load_run("mine/runs/llama_8b_32k.yaml").model.num_layers == 32
    assert cli.main(["configs", "runs", "--copy", "mine"]) == 0, "what is there already is the same"
    Path("mine/models/llama.yaml").write_text("model: {num_layers: 2}\n")
    assert cli.main(["configs", "runs", "--copy", "mine"]) == 2
    told = "mine/models/llama.yaml: exists already, with other content; copy into another folder\n"
    assert capsys.readouterr().err.endswith(told)
    assert cli.main(["configs", "modelz"]) == 2
    assert "modelz: no such configuration; megatron-attn2d configs lists them" in capsys.readouterr().err


def test_a_wheel_holds_them(folder: Path) -> None:
    code = "from setuptools import setup; setup()"
    command = [sys.executable, "-c", code, "-q", "egg_info", "-e", folder, "build_py", "-d", folder / "lib"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=100)
    package = folder / "lib" / "megatron_attn2d"
    assert not (package / "configs").is_symlink()
    assert sorted(path.relative_to(package / "configs").as_posix() for path in package.glob("configs/*/*")) == SHIPPED
    assert (package / "launch" / "job.sbatch").is_file()
    assert shipped.folder().samefile(ROOT / "configs")

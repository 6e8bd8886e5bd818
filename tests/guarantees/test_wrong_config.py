"""A wrong configuration ends the command at once, with one message; nothing that a YAML holds is run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_attn2d import cli
from megatron_attn2d.config import ConfigError, load_run, megatron_arguments, resolved_yaml
from megatron_attn2d.config.schema import RunConfig
from megatron_attn2d.config.yaml_io import dump
from megatron_attn2d.preview import memory
from megatron_attn2d.preview.topology import picture
from tests.config.base import BASE, split_overrides
from tests.config.refused import REFUSED
from tests.config.refused.files import ABSENT, CONTENTS

WITHOUT_DEVICES = "data.mock=true environment.device=cuda"

# Every case in one new interpreter; says what each took and printed, and what was imported in the end.
SCRIPT = """
import contextlib, io, json, sys, time
from megatron_attn2d import cli
answers = []
for args in json.load(sys.stdin):
    began, err = time.process_time(), io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(err):
        code = cli.main(args)
    answers.append((code, err.getvalue(), time.process_time() - began))
print(json.dumps([answers, [name for name in ("torch", "megatron") if name in sys.modules]]))
"""


def interpreter(*args: str, given: str = "", cwd: Path) -> tuple[subprocess.CompletedProcess[str], float]:
    """A finished interpreter, and the CPU seconds it took: not the clock's, as others may use the cores."""
    environ = {name: value for name, value in os.environ.items() if name not in {"RANK", "WORLD_SIZE"}}
    environ["PYTHONPATH"] = str(Path(__file__).parents[2])
    scratch = partial(tempfile.TemporaryFile, "w+")
    with scratch() as entered, scratch() as out, scratch() as err:
        entered.write(given)
        entered.seek(0)
        process = subprocess.Popen([sys.executable, *args], stdin=entered, stdout=out, stderr=err, cwd=cwd, env=environ)
        # of this process alone: those of other tests may end meanwhile
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        for file in (out, err):
            file.seek(0)
        result = subprocess.CompletedProcess(process.args, process.returncode, out.read(), err.read())
    return result, usage.ru_utime + usage.ru_stime


MISTAKES = {("run.yaml", *split_overrides(overrides)): message for overrides, message in (REFUSED | ABSENT).items()}
for number, message in enumerate(CONTENTS.values()):
    MISTAKES[(f"{number}.yaml",)] = "..." + message.replace("run.yaml", f"{number}.yaml")
"""Arguments of `train` -> the message; an ellipsis stands for what is not compared."""


@dataclass
class Answers:
    """What `train` does about each of the mistakes, in one new interpreter."""

    codes_and_texts: dict[tuple[str, ...], tuple[int, str]]
    slowest: float
    """Seconds of CPU from the start of the interpreter to the end of the slowest case, if that came first."""
    imported: list[str]
    files: set[str]
    """In the working directory afterwards."""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    directory = tmp_path_factory.mktemp("mistakes")
    (directory / "run.yaml").write_text(BASE)
    for number, content in enumerate(CONTENTS):
        (directory / f"{number}.yaml").write_text(content.replace("run.yaml", f"{number}.yaml"))
    cases = [["train", run, *(word if "=" in word else f" {word}" for word in words)] for run, *words in MISTAKES]
    result, seconds = interpreter("-c", SCRIPT, given=json.dumps(cases), cwd=directory)
    assert result.returncode == 0, result.stderr
    found, imported = json.loads(result.stdout)
    taken = [own for _, _, own in found]
    return Answers(
        {case: (code, text) for case, (code, text, _) in zip(MISTAKES, found, strict=True)},
        seconds - sum(taken) + max(taken),
        imported,
        {path.name for path in directory.iterdir()},
    )


@pytest.mark.parametrize("case", MISTAKES, ids=lambda case: " ".join(case[1:] or case)[:60])
def test_a_mistake_ends_train_with_its_message_alone(case: tuple[str, ...], answers: Answers) -> None:
    code, text = answers.codes_and_texts[case]
    message, expected = text.removesuffix("\n").removeprefix("megatron-attn2d: "), MISTAKES[case]
    assert code == 2
    assert "Traceback" not in text
    if expected.startswith("..."):
        assert expected.removeprefix("...") in message
    elif expected.endswith("..."):
        assert message.startswith(expected.removesuffix("..."))
    else:
        assert message.strip() == expected


def test_mistakes_end_train_at_once_and_before_torch_is_imported(answers: Answers) -> None:
    assert len(MISTAKES) > 120
    assert answers.imported == [], "a process group needs torch"
    assert answers.slowest < 5
    assert "pwned" not in answers.files


@pytest.mark.parametrize("overrides", ["model.num_layers=x", WITHOUT_DEVICES])
def test_as_a_user_types_it(overrides: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(BASE)
    command = ("-m", "megatron_attn2d.cli", "train", "run.yaml", *overrides.split())
    result, seconds = interpreter(*command, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("megatron-attn2d: ")
    assert len(result.stderr.splitlines()) == 1
    assert seconds < 5
    if overrides == WITHOUT_DEVICES:
        assert "environment.device = 'cuda': 8 ranks on this machine, which has 0 CUDA devices; start" in result.stderr
        return
    result, _ = interpreter(*command, "--debug", cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr.startswith("Traceback")
    assert "model.num_layers = 'x': not an integer" in result.stderr


# --- anything at all ---

KEYS = sorted(
    f"{title}.{name}"
    for title, section in RunConfig.model_fields.items()
    for name in getattr(section.annotation, "model_fields", {})
)
NUMBERS = st.integers(-2, 9) | st.sampled_from([12, 16, 64, 256, 1023, 4096, 2**31, 2**53, -(2**63), 10**29])
WORDS = st.text(max_size=8) | st.sampled_from(
    ["auto", "ring", "ulysses", "all_gather", "full", "uniform", "cuda", "cpu", "a/b", "../x", "\x00", "$(id)"]
)
VALUES = st.recursive(
    NUMBERS | WORDS | st.none() | st.booleans() | st.floats(),
    lambda sub: st.lists(sub, max_size=3) | st.dictionaries(WORDS, sub, max_size=2),
    max_leaves=4,
)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(KEYS), NUMBERS | VALUES, min_size=1, max_size=4))
def test_any_values_of_any_keys_are_refused_or_can_be_explained(tmp_path_factory: Any, values: dict[str, Any]) -> None:
    path = tmp_path_factory.getbasetemp() / "any-values.yaml"
    path.write_text(BASE)
    overrides = [f"{key}={dump({'x': value}).partition(':')[2].strip()}" for key, value in values.items()]
    began = time.process_time()
    try:
        run = load_run(path, overrides)
        megatron_arguments(run)
    except ConfigError:  # any other exception fails the test
        assert time.process_time() - began < 5
    else:
        path.write_text(resolved_yaml(run))
        assert load_run(path) == run
        picture(run)
        memory.report(run)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(st.recursive(VALUES, lambda sub: st.dictionaries(st.sampled_from([*RunConfig.model_fields, "extends"]), sub)))
def test_any_file_is_read_or_refused(tmp_path_factory: Any, content: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "any-file.yaml"
    path.write_text(dump(content), encoding="utf-8", errors="surrogatepass")
    assert cli.main(["train", str(path), "--dry-run"]) == 2


EXECUTABLE = (
    "!!python/object/apply:os.system ['touch pwned']",
    "!!python/object/new:os.system ['touch pwned']",
    "!!python/name:os.system",
    "!!python/module:os",
    "!!python/object:megatron_attn2d.config.schema.Run {}",
    "!<tag:yaml.org,2002:python/object/apply:os.system> ['touch pwned']",
)


@pytest.mark.parametrize("value", EXECUTABLE)
def test_no_tag_of_python_runs_anything(value: str, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(f"{BASE}\nrun: {value}\n")
    assert cli.main(["train", "run.yaml"]) == 2
    Path("run.yaml").write_text(BASE)
    assert cli.main(["train", "run.yaml", f"run.name={value}"]) == 2
    assert capsys.readouterr().err.count("could not determine a constructor for the tag") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]

"""Reading RUN_DIR/metrics.jsonl and validation.jsonl, which `megatron.progress` writes: a JSON object a step."""

import json
from pathlib import Path

from megatron_attn2d.config.errors import UsageError

Steps = dict[int, dict[str, float]]
"""What is recorded of each step, by its number; see `megatron.progress.Step` for names and units."""


def read_validation(run_dir: Path) -> dict[int, float]:
    """The loss on the validation set after each step that was followed by a validation; empty where none was.

    Raises:
        UsageError: the file can't be read.
    """
    path = run_dir / "validation.jsonl"
    if not path.exists():
        return {}
    found: dict[int, float] = {}
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            recorded = json.loads(line)
            if recorded["set"] == "validation":
                found[int(recorded["step"])] = float(recorded["loss"])
        except (ValueError, KeyError, TypeError) as error:
            if number < len(lines):  # else a run was killed while writing it
                raise UsageError(f"{path}, line {number}: not a validation ({error})") from error
    return found


def read_steps(run_dir: Path) -> Steps:
    """The steps of a run, ascending; a step recorded twice counts as it was last, what is null is left out.

    Raises:
        UsageError: there is no such file, or none that can be read.
    """
    path = run_dir / "metrics.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; give the directory of a run that has made a step") from error
    steps: Steps = {}
    for number, line in enumerate(lines, 1):
        try:
            recorded = json.loads(line)
            steps[int(recorded["step"])] = {
                "loss": float(recorded["loss"]),
                **{name: float(value) for name, value in recorded.items() if value is not None},
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if number == len(lines):  # a run was killed while writing it
                continue
            raise UsageError(f"{path}, line {number}: not a step ({error})") from error
    if not steps:
        raise UsageError(f"{path}: no step in it yet")
    return dict(sorted(steps.items()))

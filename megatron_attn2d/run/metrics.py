"""Reads RUN_DIR/metrics.jsonl and validation.jsonl, which `training.progress` writes: a JSON object per step."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_attn2d.errors import UsageError

Steps = dict[int, dict[str, float]]
"""The record of each step, by its number; see `training.step_record.Step` for names and units."""


def read_steps(run_dir: Path) -> Steps:
    """The steps of a run, ascending; of a step that was recorded twice the last record counts.

    A loss of null is read as NaN; other values of null are left out.

    Raises:
        UsageError: there is no such file, it holds no step, or it can't be read.
    """
    path = run_dir / "metrics.jsonl"

    def step(recorded: dict[str, Any]) -> tuple[int, dict[str, float]]:
        values = {name: float(value) for name, value in recorded.items() if value is not None}
        return int(recorded["step"]), values if recorded["loss"] is not None else {"loss": math.nan, **values}

    steps = dict(_records(path, step, "a step"))
    if not steps:
        raise UsageError(f"{path}: no step in it yet")
    return dict(sorted(steps.items()))


def read_validation(run_dir: Path) -> dict[int, float]:
    """The validation losses, in nats per token, by the step that they followed; empty where none was measured.

    Raises:
        UsageError: the file can't be read.
    """
    path = run_dir / "validation.jsonl"
    if not path.exists():
        return {}

    def validation(recorded: dict[str, Any]) -> tuple[str, int, float]:
        return recorded["set"], int(recorded["step"]), float(recorded["loss"])

    return {step: loss for which, step, loss in _records(path, validation, "a validation") if which == "validation"}


def _records[T](path: Path, parse: Callable[[Any], T], what: str) -> Iterator[T]:
    """What `parse` makes of each line, except of a last one that a killed run left unfinished."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; give the directory of a run that has made a step") from error
    for number, line in enumerate(lines, 1):
        try:
            yield parse(json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if number < len(lines):
                raise UsageError(f"{path}, line {number}: not {what} ({error})") from error

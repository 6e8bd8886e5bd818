"""Keeps one run in Weights & Biases per run directory, which each continuation resumes."""

from __future__ import annotations

import os
import uuid
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from megatron_attn2d.run import checkpoints

NAME = "wandb-run-id"


@contextmanager
def continued(megatron_args: Sequence[str]) -> Iterator[None]:
    """While entered, `wandb.init` resumes the run of the directory `--run-dir`, or begins one.

    A training without a checkpoint begins at its first step, and so does a new run, as the record in metrics.jsonl
    does. A WANDB_RUN_ID in the environment is left as it is.
    """
    parser = ArgumentParser(allow_abbrev=False, add_help=False)
    for flag in ("--run-dir", "--wandb-project"):
        parser.add_argument(flag)
    given, _ = parser.parse_known_args(megatron_args)
    reports = os.environ.get("RANK", "0") == str(int(os.environ.get("WORLD_SIZE", "1")) - 1)  # upstream: the last rank
    if not (given.wandb_project and given.run_dir and reports) or "WANDB_RUN_ID" in os.environ:
        yield
        return
    with mock.patch.dict(os.environ, WANDB_RUN_ID=_identity(Path(given.run_dir)), WANDB_RESUME="allow"):
        yield


def _identity(run_dir: Path) -> str:
    path = run_dir / NAME
    if checkpoints.last_complete(run_dir / "checkpoints") is None or not path.is_file():
        path.write_text(f"{uuid.uuid4().hex[:8]}\n")
    return path.read_text().strip()

"""The record of a training step: its fields, its line of JSON, and its scalars for trackers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_ALWAYS = ("loss", "grad_norm", "lr")
"""Fields that are recorded as null too: no token counted, or the optimizer skipped the step."""


@dataclass(frozen=True)
class Step:
    """The record of a training step."""

    step: int
    """Number of the step, from 1."""
    loss: float | None
    """Mean loss of the tokens of the global batch, in nats; None where all of them are masked. NaN is a fault."""
    grad_norm: float | None
    """Norm of the gradient before clipping; None where the optimizer skipped the step."""
    lr: float | None
    """Learning rate."""
    tokens_per_s: float
    """Tokens of the global batch, without padding, over the seconds that the step took, all ranks together."""
    elapsed_s: float
    """Seconds since training began, without the time that was lost before a restart."""
    tflops: float
    """10^12 floating-point operations per second and rank, counted by upstream's formula. Where documents are sequences
    of their own, their tokens count, without padding, and the attention within each."""
    memory_gib: float
    """Memory of the reporting rank, in GiB: on a GPU the most that tensors have taken so far; on CPU the resident
    memory of the process."""
    mfu: float | None = None
    """Model FLOP/s utilization: `tflops` over the card's peak; None where the peak isn't known."""
    padding: float | None = None
    """Share of the batch that is padding of documents; None where documents are not padded."""
    offloaded_gib: float | None = None
    """GiB that the reporting rank has taken on its host for training.offload_activations; None without it."""
    attention_wait: float | None = None
    """Share of the step in which the reporting rank waited for attention's messages; None where it is not measured."""

    def line(self) -> str:
        """The step as a line of metrics.jsonl."""
        return json_line({name: value for name, value in asdict(self).items() if value is not None or name in _ALWAYS})

    def scalars(self, ranks: int) -> dict[str, float]:
        """The scalars that trackers get besides upstream's, by name.

        Args:
            ranks: the world size.
        """
        values = {
            "tokens-per-second": self.tokens_per_s,
            "tokens-per-second-per-gpu": self.tokens_per_s / ranks,
            "tflops-per-gpu": self.tflops,
            "mfu": self.mfu,
            "memory-gib": self.memory_gib,
            "padding": self.padding,
            "offloaded-gib": self.offloaded_gib,
            "attention-wait": self.attention_wait,
        }
        return {name: value for name, value in values.items() if value is not None}


def json_line(values: dict[str, Any]) -> str:
    """`values` as a line of JSON; as JSON has no NaN and no infinity, they become strings that `float` reads."""
    strict = {
        name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }
    return json.dumps(strict, allow_nan=False) + "\n"


def complete_lines(path: Path) -> list[str]:
    """The lines of a file, without a last one that an interrupted write left unfinished."""
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def rewrite(path: Path, lines: Iterable[str]) -> None:
    """Replace the file `path` by one that holds `lines`, at once."""
    rewritten = path.with_suffix(".jsonl.new")
    rewritten.write_text("".join(lines))
    rewritten.replace(path)

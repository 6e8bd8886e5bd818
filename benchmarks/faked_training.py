#!/usr/bin/env python3
"""Train as one rank of many whose other ranks are faked: the memory and the kernels of a long step, on one GPU.

    python benchmarks/faked_training.py 8 configs/runs/llama_8b_1m.yaml run.dir=/tmp/one model.num_layers=4 ...

This process is rank 0 of a `faked_world` and does what `megatron-attn2d train` does there, with the tensor and context
ranks of the YAML. Losses are wrong, so what compares or rejects them is switched off. The optimizer makes its state
before the first step, which then takes as much memory as every later one. RUN_DIR/parts.jsonl gets a line per step:
seconds of the forward pass, of the backward pass and of the whole step, and GiB of GPU and host.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_attn2d import cli
from megatron_attn2d.config import load_run
from megatron_attn2d.launch import environment
from megatron_attn2d.launch.ranks import name_rank

UNCHECKED = ("training.self_check=false", "megatron_args.no_check_for_nan_in_loss_and_grad=true")
"""Overrides under which wrong numbers train on."""


def main() -> int:
    """Train; the exit code."""
    ranks, yaml, *overrides = sys.argv[1:]
    overrides += UNCHECKED
    name_rank(0, int(ranks), 29500)  # a port that nobody listens on
    run = load_run(yaml, overrides, world_size=int(ranks))
    environment.apply_variables(run.environment.device, run.environment.variables)  # before torch is imported
    from faked_world import faked_world

    from megatron_attn2d.training import progress

    with (
        faked_world(int(ranks), refilled=True),
        mock.patch.object(progress, "reported", _reported),
    ):
        return cli.main(["train", yaml, *overrides])


@contextmanager
def _reported(args: Namespace, console: TextIO) -> Iterator[None]:
    """As `progress.reported`, by this rank although it is not the last one; and the parts of each step."""
    from megatron_attn2d.megatron.upstream.patching import Patch, applied
    from megatron_attn2d.training.progress import Reporter

    reporter, parts = Reporter(args, console), Parts(Path(args.run_dir, "parts.jsonl"))
    reporter._reports = True
    schedules, training = "megatron.core.pipeline_parallel.schedules", "megatron.training.training"
    reason = "parts of a step are timed"
    patches = (
        *reporter.patches(),
        Patch(f"{schedules}:forward_step", parts.timed("forward"), reason),
        Patch(f"{schedules}:backward_step", parts.timed("backward"), reason),
        Patch(f"{training}:train_step", parts.recorded, reason),
        Patch(f"{training}:train", _with_state, "the optimizer makes its state in its first step, after the peak"),
        Patch(
            "megatron.training.dist_signal_handler:all_gather_item",
            lambda original: lambda item, *args, **kwargs: [item],
            "it asks whether other ranks got a signal, over NCCL or Gloo alone",
        ),
    )
    with applied(patches):
        yield


class Parts:
    """Seconds and memory of each step and of its parts."""

    def __init__(self, path: Path) -> None:
        self._path, self._seconds = path, Counter[str]()

    def timed(self, name: str) -> Callable[[Any], Any]:
        """A patch that adds the seconds of a function to a part."""

        def wrap(function: Any) -> Any:
            def timed(*args: Any, **kwargs: Any) -> Any:
                begin = _now()
                found = function(*args, **kwargs)
                self._seconds[name] += _now() - begin
                return found

            return timed

        return wrap

    def recorded(self, train_step: Any) -> Any:
        """A patch that writes a line for each step."""

        def step(*args: Any, **kwargs: Any) -> Any:
            self._seconds.clear()
            lasting, begin = _gpu_gib()["allocated"], _now()
            found = train_step(*args, **kwargs)
            line = {"lasting_gib": lasting, **{f"{name}_s": seconds for name, seconds in self._seconds.items()}}
            line |= {"step_s": _now() - begin, **{f"{name}_gib": size for name, size in _gpu_gib().items()}}
            line["host_process_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            with self._path.open("a") as lines:
                lines.write(json.dumps(line) + "\n")
            return found

        return step


def _with_state(train: Any) -> Any:
    """Upstream's loop, before which a fused Adam makes its moments; torch's own does not start from made ones."""

    def with_state(forward_step: Any, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        for one in getattr(optimizer, "chained_optimizers", [optimizer]):
            inner = getattr(one, "optimizer", None)
            if type(inner).__name__ == "FusedAdam" and getattr(one, "init_state_fn", None):
                one.init_state_fn(inner, one.config)
        return train(forward_step, model, optimizer, *args, **kwargs)

    return with_state


def _now() -> float:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _gpu_gib() -> dict[str, float]:
    """What tensors take now, took at most, what torch holds of the GPU at most, and what all of the process takes."""
    import torch

    if not torch.cuda.is_available():
        return dict.fromkeys(("allocated", "peak", "reserved", "taken"), 0.0)
    free, total = torch.cuda.mem_get_info()
    sizes = {
        "allocated": torch.cuda.memory_allocated(),
        "peak": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
        "taken": total - free,
    }
    return {name: size / 2**30 for name, size in sizes.items()}


if __name__ == "__main__":
    sys.exit(main())

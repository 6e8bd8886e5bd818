"""What a run shows and records: a line per step on the console, a JSON object per step in RUN_DIR/metrics.jsonl.

The same of validation, in RUN_DIR/validation.jsonl. Upstream logs to standard output at length; with a run directory
that goes to RUN_DIR/logs/rank-N.log instead.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import sys
import time
from argparse import Namespace
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

import psutil
import torch

from megatron_attn2d.megatron import recomputation
from megatron_attn2d.megatron.upstream.patching import Patch, applied
from megatron_attn2d.training.attention_wait import AttentionWait
from megatron_attn2d.training.first_step import FirstStep

_ALWAYS = ("loss", "grad_norm", "lr")  # recorded as null too: no token counted, or the optimizer skipped the step
COUNTED = "share of tokens counted"
"""Beside a step's loss, the share of its tokens that count in it."""


@dataclass(frozen=True)
class Step:
    """What is recorded of a training step."""

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
    """Seconds since training began, without the time before a restart that was lost."""
    tflops: float
    """10^12 floating-point operations per second and rank, counted by upstream's formula: where documents are sequences
    of their own, for the tokens that they have and the attention within each."""
    memory_gib: float
    """Of the reporting rank, in GiB: the most that tensors took on its GPU so far; on CPU its resident memory."""
    mfu: float | None = None
    """Model FLOP/s utilization: `tflops` over the card's peak; None where the peak isn't known."""
    padding: float | None = None
    """Share of the batch that is padding of documents; None where documents are not padded."""
    offloaded_gib: float | None = None
    """GiB that the reporting rank has taken on its host for training.offload_activations; None without."""
    attention_wait: float | None = None
    """Share of the step in which the reporting rank waited for attention's messages; None where nobody asked."""


@contextmanager
def quiet(run_dir: str | None, rank: int) -> Iterator[TextIO]:
    """Sends what this process prints, native code included, to the rank's log; yields the console.

    Without a run directory nothing is redirected.
    """
    if run_dir is None:
        yield sys.stdout
        return
    log_path = Path(run_dir, "logs", f"rank-{rank}.log")
    log_path.parent.mkdir(parents=True, exist_ok=True)
    _flush()
    saved = os.dup(1), os.dup(2)
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    try:
        with os.fdopen(os.dup(saved[0]), "w", buffering=1) as console:
            yield console
    finally:
        _flush()
        for descriptor, standard in zip(saved, (1, 2), strict=True):
            os.dup2(descriptor, standard)
            os.close(descriptor)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


class Reporter:
    """Follows upstream's training loop and reports its steps, from the rank that holds the loss and is the last."""

    def __init__(self, args: Namespace, console: TextIO) -> None:
        self._args = args
        self._console = console
        self._reports = args.rank == args.world_size - 1
        self._metrics = Path(args.run_dir, "metrics.jsonl") if args.run_dir else None
        self._validation = Path(args.run_dir, "validation.jsonl") if args.run_dir else None
        self._validated: dict[str, Any] = {}
        self._timed_out = False
        self._complete: set[tuple[str, int]] = set()  # validations of this start, by set and step
        self._first = FirstStep(args, self._print)
        self._wait = AttentionWait() if args.log_attention_communication else None
        self._step_seconds = 0.0
        self._counted = 1.0
        self._mean_seconds: float | None = None
        self._began = time.perf_counter()
        self._started = False

    def patches(self) -> tuple[Patch, ...]:
        """The functions of upstream's loop that are followed, and attention's messages."""
        reason = "each step is reported as it ends"
        return (
            Patch("megatron.training.training:train_step", self._timed, reason),
            Patch("megatron.training.training:training_log", self._followed, reason),
            Patch("megatron.training.training:save_checkpoint_and_time", self._announced, reason),
            Patch("megatron.training.training:evaluate", self._kept, "what it finds is only printed"),
            Patch(
                "megatron.training.training:evaluate_and_print_results",
                self._told,
                "what it finds is only printed, and after the last step found again, on other samples",
            ),
            *([self._wait.patch()] if self._wait else []),
        )

    def _timed(self, train_step: Any) -> Any:
        from megatron.core.num_microbatches_calculator import get_num_microbatches

        @functools.wraps(train_step)
        def timed(forward_step_func: Any, *args: Any, iteration: int, **kwargs: Any) -> Any:
            if self._wait:
                self._wait.take()
            micro_batches, rest = get_num_microbatches(), self._args.train_iters - iteration
            if self._reports:
                forward_step_func = self._first.watched(forward_step_func, micro_batches, rest)
            begin = time.perf_counter()
            result = train_step(forward_step_func, *args, iteration=iteration, **kwargs)
            if self._reports:
                self._first.mark(micro_batches, rest)
            self._step_seconds = time.perf_counter() - begin
            self._counted = float(result[0].pop(COUNTED, 1.0))  # no loss, which the trackers would take it for
            return result

        return timed

    def _followed(self, training_log: Any) -> Any:
        @functools.wraps(training_log)
        def followed(
            loss_dict: dict[str, Any],
            total_loss_dict: Any,
            learning_rate: float | None,
            iteration: int,
            loss_scale: float,
            report_memory_flag: bool,
            skipped_iter: int,
            grad_norm: float | None,
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            if self._reports:
                documents = kwargs["total_real_tokens_in_batch"], kwargs["seqlen_squared_sum_in_batch"]
                self._report(iteration, float(loss_dict["lm loss"]), grad_norm, learning_rate, *documents)
            return training_log(
                loss_dict,
                total_loss_dict,
                learning_rate,
                iteration,
                loss_scale,
                report_memory_flag,
                skipped_iter,
                grad_norm,
                *args,
                **kwargs,
            )

        return followed

    def _announced(self, save_checkpoint_and_time: Any) -> Any:
        @functools.wraps(save_checkpoint_and_time)
        def announced(iteration: int, *args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            result = save_checkpoint_and_time(iteration, *args, **kwargs)
            if self._reports:
                self._print(f"saved step {iteration} to {self._args.save} in {time.perf_counter() - begin:.1f} s")
            return result

        return announced

    def _kept(self, evaluate: Any) -> Any:
        @functools.wraps(evaluate)
        def kept(*args: Any, **kwargs: Any) -> Any:
            result = evaluate(*args, **kwargs)
            self._validated, self._timed_out = result[0] or {}, bool(result[2])
            return result

        return kept

    def _told(self, evaluate_and_print_results: Any) -> Any:
        @functools.wraps(evaluate_and_print_results)
        def told(
            prefix: str,
            forward_step_func: Any,
            data_iterator: Any,
            model: Any,
            iteration: int,
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            which = "test" if "test set" in prefix else "validation"
            if (which, iteration) in self._complete:  # on all ranks
                return None
            self._validated, self._timed_out = {}, False
            result = evaluate_and_print_results(
                prefix, forward_step_func, data_iterator, model, iteration, *args, **kwargs
            )
            if not self._timed_out:
                self._complete.add((which, iteration))
            if self._reports and "lm loss" in self._validated:
                self._report_validation(iteration, which, float(self._validated["lm loss"]))
            return result

        return told

    def _report_validation(self, step: int, which: str, loss: float) -> None:
        if self._validation is not None:
            before = _complete_lines(self._validation) if self._validation.exists() else []
            kept = [line for line in before if (one := json.loads(line))["step"] != step or one["set"] != which]
            _rewrite(self._validation, [*kept, _json({"step": step, "set": which, "loss": loss}) + "\n"])
        self._print(f"{which} after step {step}: loss {loss:.4f}  perplexity {math.exp(min(loss, 700)):.4g}")

    def _report(
        self,
        iteration: int,
        loss: float,
        grad_norm: float | None,
        lr: float | None,
        real_tokens: float | None = None,
        squares: float | None = None,
    ) -> None:
        """Reports a step.

        Where documents are sequences of their own, `real_tokens` counts those of the global batch that are no padding,
        and `squares` sums the squares of the documents' lengths.
        """
        from megatron.core.num_microbatches_calculator import get_current_running_global_batch_size
        from megatron.training.training import num_floating_point_operations

        if not self._started:
            self._start(iteration)
        args, seconds, samples = self._args, self._step_seconds, get_current_running_global_batch_size()
        operations = num_floating_point_operations(args, samples, squares, real_tokens)
        tflops = operations / seconds / args.world_size / 1e12
        tokens = samples * args.seq_length
        step = Step(
            step=iteration,
            loss=loss if self._counted else None,
            grad_norm=None if grad_norm is None else float(grad_norm),
            lr=None if lr is None else float(lr),
            tokens_per_s=(tokens if real_tokens is None else real_tokens) / seconds,
            elapsed_s=time.perf_counter() - self._began,
            tflops=tflops,
            memory_gib=_memory_bytes() / 2**30,
            mfu=tflops / args.peak_tflops if args.peak_tflops else None,
            padding=None if real_tokens is None else 1 - real_tokens / tokens,
            offloaded_gib=taken / 2**30 if (taken := recomputation.host_bytes()) else None,
            attention_wait=self._wait.take() / seconds if self._wait else None,
        )
        if self._metrics is not None:
            recorded = {name: value for name, value in asdict(step).items() if value is not None or name in _ALWAYS}
            with self._metrics.open("a") as metrics:
                metrics.write(_json(recorded) + "\n")
        _to_trackers(step, args.world_size)
        self._print(self._line(step))

    def _start(self, iteration: int) -> None:
        """Forgets the recorded steps that this run repeats: those after the checkpoint that it resumed from.

        What a run that begins anew finds it lays aside, as metrics.jsonl.1 and so on.
        """
        self._started = True
        self._began = time.perf_counter() - self._step_seconds
        if iteration > 1:
            self._print(f"resumed after step {iteration - 1}")
        for recorded in (self._metrics, self._validation):
            if recorded is None or not recorded.exists():
                continue
            if iteration == 1:
                aside = next(path for n in itertools.count(1) if not (path := Path(f"{recorded}.{n}")).exists())
                recorded.replace(aside)
                self._print(f"an earlier run's {recorded.name} is {aside.name} now")
                continue
            kept = [line for line in _complete_lines(recorded) if json.loads(line)["step"] < iteration]
            if kept and recorded == self._metrics:
                self._began -= json.loads(kept[-1])["elapsed_s"]
            _rewrite(recorded, kept)

    def _line(self, step: Step) -> str:
        if self._mean_seconds is None or step.step % 10 == 1:  # the first steps are slower: don't let them linger
            self._mean_seconds = self._step_seconds
        self._mean_seconds += 0.2 * (self._step_seconds - self._mean_seconds)
        total = self._args.train_iters
        left = timedelta(seconds=round(self._mean_seconds * (total - step.step)))
        norm = "skipped" if step.grad_norm is None else f"{step.grad_norm:.3f}"
        lr = "" if step.lr is None else f"  lr {step.lr:.2e}"
        unit, ranks = "GPU" if torch.cuda.is_available() else "rank", self._args.world_size
        fields = [
            f"step {step.step:{len(str(total))}d}/{total}",
            "no loss: every token is masked" if step.loss is None else f"loss {step.loss:.4f}",
            f"grad norm {norm}{lr}",
            f"{step.tokens_per_s:,.0f} tokens/s" + (f" ({step.tokens_per_s / ranks:,.0f} per {unit})" * (ranks > 1)),
            f"{step.tflops:.3g} TFLOP/s per {unit}",
            None if step.mfu is None else f"MFU {step.mfu:.1%}",
            f"{step.memory_gib:.2f} GiB",
            None if step.padding is None else f"padding {step.padding:.1%}",
            None if step.offloaded_gib is None else f"{step.offloaded_gib:.2f} GiB on the host",
            None if step.attention_wait is None else f"attention waits {step.attention_wait:.1%}",
            f"ETA {left}",
        ]
        return "  ".join(field for field in fields if field)

    def _print(self, line: str) -> None:
        print(line, file=self._console, flush=True)


def _json(values: dict[str, Any]) -> str:
    """`values` as JSON, which knows no NaN and no infinity: they become strings, which `float` reads."""
    strict = {
        name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }
    return json.dumps(strict, allow_nan=False)


def _memory_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return int(psutil.Process().memory_info().rss)


def _to_trackers(step: Step, ranks: int) -> None:
    """Adds what upstream doesn't log to its TensorBoard and Weights & Biases writers, which this same rank has."""
    from megatron.training import get_tensorboard_writer, get_wandb_writer

    writer, wandb = get_tensorboard_writer(), get_wandb_writer()
    values = {
        "tokens-per-second": step.tokens_per_s,
        "tokens-per-second-per-gpu": step.tokens_per_s / ranks,
        "tflops-per-gpu": step.tflops,
        "mfu": step.mfu,
        "memory-gib": step.memory_gib,
        "padding": step.padding,
        "offloaded-gib": step.offloaded_gib,
        "attention-wait": step.attention_wait,
    }
    values = {name: value for name, value in values.items() if value is not None}
    if writer:
        for name, value in values.items():
            writer.add_scalar(name, value, step.step)
    if wandb:
        wandb.log(values, step.step)


def _complete_lines(path: Path) -> list[str]:
    """The lines of a file, without a last one that an interrupted write left unfinished."""
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def _rewrite(path: Path, lines: Iterable[str]) -> None:
    rewritten = path.with_suffix(".jsonl.new")
    rewritten.write_text("".join(lines))
    rewritten.replace(path)


def reported(args: Namespace, console: TextIO) -> AbstractContextManager[None]:
    """Reports upstream's training loop while entered."""
    return applied(Reporter(args, console).patches())

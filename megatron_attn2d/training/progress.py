"""Reports each step as a line on the console, and as a JSON object in RUN_DIR/metrics.jsonl.

Validations are shown too, and recorded in RUN_DIR/validation.jsonl.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import time
from argparse import Namespace
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

import psutil
import torch

from megatron_attn2d.megatron import recomputation
from megatron_attn2d.megatron.upstream.patching import Patch, applied
from megatron_attn2d.training.attention_wait import AttentionWait
from megatron_attn2d.training.first_step import FirstStep
from megatron_attn2d.training.step_record import Step, complete_lines, json_line, rewrite

COUNTED = "share of tokens counted"
"""Beside a step's loss, the share of its tokens that count in it."""


def reported(args: Namespace, console: TextIO) -> AbstractContextManager[None]:
    """While entered, the steps of upstream's training loop are reported."""
    return applied(Reporter(args, console).patches())


class Reporter:
    """Follows upstream's training loop; the last rank, which has the loss, reports its steps.

    Args:
        args: Megatron's arguments, as it has read them.
        console: gets the lines for people.
    """

    def __init__(self, args: Namespace, console: TextIO) -> None:
        self._args = args
        self._console = console
        self._reports = args.rank == args.world_size - 1
        self._metrics = Path(args.run_dir, "metrics.jsonl") if args.run_dir else None
        self._validation = Path(args.run_dir, "validation.jsonl") if args.run_dir else None
        self._validated: dict[str, Any] = {}  # the losses of the last evaluation
        self._timed_out = False
        self._complete: set[tuple[str, int]] = set()  # validations since this start, by set and step
        self._first = FirstStep(args, self._print)
        self._wait = AttentionWait() if args.log_attention_communication else None
        self._step_seconds = 0.0
        self._counted = 1.0
        self._mean_seconds: float | None = None
        self._began = time.perf_counter()
        self._started = False

    def patches(self) -> tuple[Patch, ...]:
        """Patches of the functions of upstream's loop that are followed, and of waiting for attention's messages."""
        reason = "each step is reported as it ends"
        return (
            Patch("megatron.training.training:train_step", self._around_train_step, reason),
            Patch("megatron.training.training:training_log", self._around_training_log, reason),
            Patch("megatron.training.training:save_checkpoint_and_time", self._around_save, reason),
            Patch("megatron.training.training:evaluate", self._around_evaluate, "upstream only prints the losses"),
            Patch(
                "megatron.training.training:evaluate_and_print_results",
                self._around_validation,
                "upstream only prints the losses, and after the last step evaluates again, on other samples",
            ),
            *([self._wait.patch()] if self._wait else []),
        )

    def _around_train_step(self, train_step: Any) -> Any:
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
            self._counted = float(result[0].pop(COUNTED, 1.0))  # else trackers would take it for a loss
            return result

        return timed

    def _around_training_log(self, training_log: Any) -> Any:
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

    def _around_save(self, save_checkpoint_and_time: Any) -> Any:
        @functools.wraps(save_checkpoint_and_time)
        def announced(iteration: int, *args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            result = save_checkpoint_and_time(iteration, *args, **kwargs)
            if self._reports:
                self._print(f"saved step {iteration} to {self._args.save} in {time.perf_counter() - begin:.1f} s")
            return result

        return announced

    def _around_evaluate(self, evaluate: Any) -> Any:
        @functools.wraps(evaluate)
        def kept(*args: Any, **kwargs: Any) -> Any:
            result = evaluate(*args, **kwargs)
            self._validated, self._timed_out = result[0] or {}, bool(result[2])
            return result

        return kept

    def _around_validation(self, evaluate_and_print_results: Any) -> Any:
        @functools.wraps(evaluate_and_print_results)
        def once_per_step(
            prefix: str,
            forward_step_func: Any,
            data_iterator: Any,
            model: Any,
            iteration: int,
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            which = "test" if "test set" in prefix else "validation"
            if (which, iteration) in self._complete:  # on all ranks alike
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

        return once_per_step

    def _report_validation(self, step: int, which: str, loss: float) -> None:
        if self._validation is not None:
            before = complete_lines(self._validation) if self._validation.exists() else []
            kept = [line for line in before if (one := json.loads(line))["step"] != step or one["set"] != which]
            rewrite(self._validation, [*kept, json_line({"step": step, "set": which, "loss": loss})])
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
        """Report a step.

        Args:
            iteration: number of the step, from 1.
            loss: in nats per token.
            grad_norm: before clipping; None where the optimizer skipped the step.
            lr: the learning rate.
            real_tokens: where documents are sequences of their own, tokens of the global batch without padding.
            squares: there, the sum of the squares of the documents' lengths.
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
            with self._metrics.open("a") as metrics:
                metrics.write(step.line())
        _to_trackers(step, args.world_size)
        self._print(self._line(step))

    def _start(self, iteration: int) -> None:
        """Drop the recorded steps that this run repeats, which come after the checkpoint that it resumed from.

        A run that begins at step 1 renames the records that it finds, to metrics.jsonl.1 and so on.
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
            kept = [line for line in complete_lines(recorded) if json.loads(line)["step"] < iteration]
            if kept and recorded == self._metrics:
                self._began -= json.loads(kept[-1])["elapsed_s"]
            rewrite(recorded, kept)

    def _line(self, step: Step) -> str:
        """The step as people read it, with the time that the rest of the run will take."""
        if self._mean_seconds is None or step.step % 10 == 1:  # a mean would carry the slow first steps along
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


def _memory_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return int(psutil.Process().memory_info().rss)


def _to_trackers(step: Step, ranks: int) -> None:
    """Add what upstream doesn't log to its TensorBoard and Weights & Biases writers, which the reporting rank has."""
    from megatron.training import get_tensorboard_writer, get_wandb_writer

    writer, wandb = get_tensorboard_writer(), get_wandb_writer()
    scalars = step.scalars(ranks)
    if writer:
        for name, value in scalars.items():
            writer.add_scalar(name, value, step.step)
    if wandb:
        wandb.log(scalars, step.step)

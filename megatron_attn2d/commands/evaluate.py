"""`megatron-attn2d eval`: loss and perplexity of a run's checkpoint by position, at any context."""

from __future__ import annotations

import argparse
import json
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from megatron_attn2d.commands import evaluate_tasks
from megatron_attn2d.commands.evaluate_tasks import Words
from megatron_attn2d.commands.evaluation_data import check_output, data_set, samples
from megatron_attn2d.commands.on_ranks import on_ranks
from megatron_attn2d.config import ConfigError, RunConfig, load_run, megatron_arguments
from megatron_attn2d.config.forward_only import FORWARD_ONLY, accepted, on_another_grid, trained_run
from megatron_attn2d.errors import UsageError
from megatron_attn2d.launch import environment
from megatron_attn2d.run import checkpoints


def add(commands: Any) -> list[argparse.ArgumentParser]:
    """Add `eval` to the command line's `commands`, and return its parser."""
    parser = commands.add_parser("eval", help="loss, or scores, at a long context", description=_evaluate.__doc__)
    parser.add_argument("run", metavar="RUN_DIR")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="override keys of the run's config.yaml")
    parser.add_argument("--data", metavar="PREFIX", help="a data set, or a text, JSONL or Parquet file")
    parser.add_argument("--key", metavar="NAME", help="of the text in a JSONL or Parquet file (default: text)")
    parser.add_argument(
        "--context", required=True, nargs="+", action=Words, metavar="N", help="tokens; several with --tasks"
    )
    parser.add_argument("--samples", type=int, metavar="N", help="windows at most (default: 16), haystacks (4)")
    parser.add_argument("--buckets", type=int, metavar="N", help="each twice as long as the one before it (default: 8)")
    parser.add_argument("--step", type=int, metavar="N", help="of the checkpoint (default: the last complete one)")
    parser.add_argument("-o", "--output", metavar="JSON", help="default: RUN_DIR/eval-CONTEXT.json, eval-tasks.json")
    evaluate_tasks.add_arguments(parser)
    parser.set_defaults(command=_evaluate, intermixed=[])
    return [parser]


def _evaluate(args: argparse.Namespace) -> int:
    """Evaluate a run's checkpoint, by position or on tasks; context_parallel.* of the run may be overridden."""
    args.overrides += args.intermixed
    contexts = evaluate_tasks.contexts(args.context)
    if args.tasks is not None:
        return evaluate_tasks.run_tasks(args, contexts)
    evaluate_tasks.refuse_options(args)
    if len(contexts) > 1:
        raise UsageError(f"--context {' '.join(args.context)}: loss by position takes one; choose one, or give --tasks")
    if args.data is None:
        raise UsageError("--data: loss by position needs a data set or a file; name one, or give --tasks")
    (context,) = contexts
    world_size = environment.launched_world_size()
    run = configuration(Path(args.run), context, args.overrides, world_size)
    step = checkpoints.chosen(Path(args.run) / "checkpoints", args.step)
    output = args.output or str(Path(args.run) / f"eval-{context}.json")
    check_output(Path(output))
    environment.apply_variables(run.environment.device, run.environment.variables)
    arguments = [
        *megatron_arguments(run),
        *("--skip-train", "--no-load-optim", "--no-load-rng", "--exit-on-missing-checkpoint"),
        *("--ckpt-step", str(step)),
    ]
    with ExitStack() as stack:
        prefix = stack.enter_context(data_set(args.data, args.key, run, launched=world_size is not None))
        windows = samples(Path(prefix), context, 16 if args.samples is None else args.samples)
        edges = bucket_edges(context, 8 if args.buckets is None else args.buckets)
        from megatron_attn2d.training import evaluation

        request = evaluation.Request(args.data, prefix, windows, edges, output, step)
        return on_ranks(run, partial(evaluation.main, request), arguments, launched=world_size is not None)


def configuration(run_dir: Path, context: int, overrides: list[str], world_size: int | None = None) -> RunConfig:
    """The run in `run_dir` at another context, without keys about training.

    Args:
        run_dir: the run's directory.
        context: tokens of a window.
        overrides: the user's.
        world_size: ranks that a launcher has started; None without one.

    Raises:
        ConfigError: the model has learned fewer positions than `context`, or an override changes a key on which the
            weights depend or that `eval` decides about.
        UsageError: there is no run in `run_dir`, or `context` is not a context of this run.
    """
    path, trained = trained_run(run_dir)
    positions = trained.model.max_position_embeddings or trained.training.seq_length
    if context < 1:
        raise UsageError(f"--context {context}: choose 1 or more")
    if trained.model.position_embedding_type == "learned_absolute":
        if context > positions:
            raise ConfigError(
                "model.position_embedding_type",
                "learned_absolute",
                f"the run has learned {positions} positions, --context is {context}",
                f"choose --context {positions} or less",
            )
    else:
        positions = max(positions, context)
    decided = [
        *FORWARD_ONLY,
        *on_another_grid(overrides),
        f"training.seq_length={context}",
        f"model.max_position_embeddings={positions}",
        f"run.dir={json.dumps(str(run_dir))}",
    ]
    reasons = {
        "run.dir": f"the checkpoint of {run_dir} is evaluated",
        "training.seq_length": f"--context {context} says how long a window is",
        "model.max_position_embeddings": f"follows from --context {context}",
    }
    loaded = accepted(path, trained, decided, overrides, reasons, "eval")
    try:
        return load_run(path, loaded, world_size=world_size)
    except ConfigError as error:  # the user gave --context, not the key
        raise UsageError(str(error).replace(f"training.seq_length = {context}", f"--context {context}")) from error


def bucket_edges(context: int, buckets: int) -> tuple[int, ...]:
    """The edges 0, ..., context / 4, context / 2, context of `buckets` buckets that double, rounded to whole tokens."""
    if buckets < 1:
        raise UsageError(f"--buckets {buckets}: choose 1 or more")
    return tuple(sorted({0} | {context >> i for i in range(buckets)}))

"""`megatron-attn2d eval`: loss and perplexity of a run's checkpoint by position, at a context of one's choice."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from megatron_attn2d.config import ConfigError, RunConfig, load_run, megatron_arguments
from megatron_attn2d.config.forward_only import FORWARD_ONLY, check_overrides, stages_of_training
from megatron_attn2d.config.loading import read_run
from megatron_attn2d.config.read import build_run
from megatron_attn2d.data.indexed import prefix_fault
from megatron_attn2d.errors import ConfigErrors, UsageError
from megatron_attn2d.launch import environment
from megatron_attn2d.run import checkpoints


def add(commands: Any) -> list[argparse.ArgumentParser]:
    """Adds `eval` to the command line's `commands`; returns its parser."""
    parser = commands.add_parser("eval", help="loss by position at a long context", description=_evaluate.__doc__)
    parser.add_argument("run", metavar="RUN_DIR")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="override keys of the run's config.yaml")
    parser.add_argument("--data", required=True, metavar="PREFIX", help="a data set, or a text, JSONL or Parquet file")
    parser.add_argument("--key", metavar="NAME", help="of the text in a JSONL or Parquet file (default: text)")
    parser.add_argument("--context", required=True, type=int, metavar="N", help="tokens of a window")
    parser.add_argument("--samples", type=int, default=16, metavar="N", help="windows at most (default: 16)")
    parser.add_argument("--buckets", type=int, default=8, metavar="N", help="each twice as long as the one before it")
    parser.add_argument("--step", type=int, metavar="N", help="of the checkpoint (default: the last complete one)")
    parser.add_argument("-o", "--output", metavar="JSON", help="default: RUN_DIR/eval-CONTEXT.json")
    parser.set_defaults(command=_evaluate)
    return [parser]


def _evaluate(args: argparse.Namespace) -> int:
    """Evaluate a run's checkpoint forward only, by position; context_parallel.* of the run may be overridden."""
    world_size = environment.launched_world_size()
    run = configuration(Path(args.run), args.context, args.overrides, world_size)
    step = checkpoints.chosen(Path(args.run) / "checkpoints", args.step)
    output = args.output or str(Path(args.run) / f"eval-{args.context}.json")
    _check_output(Path(output))
    environment.apply_variables(run.environment.device, run.environment.variables)
    arguments = [
        *megatron_arguments(run),
        *("--skip-train", "--no-load-optim", "--no-load-rng", "--exit-on-missing-checkpoint"),
        *("--ckpt-step", str(step)),
    ]
    with ExitStack() as stack:
        prefix = args.data
        if Path(prefix).is_file():
            if world_size:
                raise UsageError(f"{prefix}: under a launcher give a data set, made by megatron-attn2d data build")
            folder = stack.enter_context(tempfile.TemporaryDirectory(dir=args.run, prefix=".eval-"))
            prefix = _built(Path(prefix), args.key or "text", Path(folder) / "data", run)
        else:
            _check_data(prefix, args.key, run)
        samples = _samples(Path(prefix), args.context, args.samples)
        edges = bucket_edges(args.context, args.buckets)
        from megatron_attn2d.launch import ranks
        from megatron_attn2d.training import evaluation

        request = evaluation.Request(args.data, prefix, samples, edges, output, step)
        if world_size:
            environment.adopt_launcher()
            evaluation.main(request, arguments)
            return 0
        environment.check_devices(run.environment.device, run.world_size)
        target = partial(evaluation.main, request)
        return ranks.run_local(run.world_size, target, arguments, device=run.environment.device)


def configuration(run_dir: Path, context: int, overrides: list[str], world_size: int | None = None) -> RunConfig:
    """The run in `run_dir` without what is about training, at another context.

    Raises:
        ConfigError: there is none, the model has no positions beyond those that it was trained with, or overrides
            change what the weights depend on or what `eval` decides.
    """
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise UsageError(f"{path}: no such file; give the directory of a run")
    trained = build_run(read_run(path))
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
        f"training.seq_length={context}",
        f"model.max_position_embeddings={positions}",
        f"run.dir={json.dumps(str(run_dir))}",
    ]
    asked = build_run(read_run(path, [*decided, *overrides]))
    reasons = {
        "run.dir": f"the checkpoint of {run_dir} is evaluated",
        "training.seq_length": f"--context {context} says how long a window is",
        "model.max_position_embeddings": f"follows from --context {context}",
    }
    check_overrides(trained, build_run(read_run(path, decided)), asked, reasons, "eval")
    left_out = [f"megatron_args.{name}=null" for name in stages_of_training(trained, asked)]
    try:
        return load_run(path, [*decided, *overrides, *left_out], world_size=world_size)
    except ConfigError as error:  # of keys that the user spelled otherwise
        raise UsageError(str(error).replace(f"training.seq_length = {context}", f"--context {context}")) from error


def _check_output(output: Path) -> None:
    """Refuses before the evaluation what could not be written after it."""
    if output.is_dir():
        raise UsageError(f"--output {output}: a directory; name a JSON file")
    if not output.parent.is_dir():
        raise UsageError(f"--output {output}: there is no directory {output.parent}; make it, or choose another")
    if not os.access(output.parent, os.W_OK | os.X_OK):
        raise UsageError(f"--output {output}: {output.parent} can't be written to; choose another")


def _built(file: Path, key: str, prefix: Path, run: RunConfig) -> str:
    """`file` as a data set of the run's tokenizer."""
    from megatron_attn2d.data.build import build
    from megatron_attn2d.data.tokenizers import from_yaml_section

    build([file], prefix, from_yaml_section(run.data), key=key)
    return str(prefix)


def _check_data(prefix: str, key: str | None, run: RunConfig) -> None:
    """Refuses a data set of another tokenizer than the run's."""
    from megatron_attn2d.data.matching import mismatches

    if fault := prefix_fault(prefix):
        raise UsageError(f"--data {prefix}: {'; '.join(fault)}")
    if key is not None:
        raise UsageError(f"--key {key}: {prefix} is no file of texts but a data set, of tokens; leave it out")
    if errors := list(mismatches(Path(prefix), run.data)):
        raise ConfigErrors(errors)


def _samples(prefix: Path, context: int, most: int) -> int:
    """How many windows there are, up to `most`."""
    from megatron_attn2d.data.inspect import open_indexed

    if most < 1:
        raise UsageError(f"--samples {most}: choose 1 or more")
    indexed = open_indexed(prefix)  # named: its arrays are views of a mapping that ends with it
    tokens = int(indexed.sequence_lengths.sum())
    if tokens <= context:
        raise UsageError(f"{prefix}: {tokens:,} tokens, a window of --context {context:,} needs one more than that")
    return min(most, (tokens - 1) // context)


def bucket_edges(context: int, buckets: int) -> tuple[int, ...]:
    """0, ..., context / 4, context / 2, context: buckets that double, as far as whole tokens allow."""
    if buckets < 1:
        raise UsageError(f"--buckets {buckets}: choose 1 or more")
    return tuple(sorted({0} | {context >> i for i in range(buckets)}))

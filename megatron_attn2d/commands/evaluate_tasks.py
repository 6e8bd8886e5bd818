"""Scores of a checkpoint on long texts: `megatron-attn2d eval` with --tasks."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from megatron_attn2d.commands.evaluation_data import check_output, data_set, samples
from megatron_attn2d.commands.on_ranks import on_ranks
from megatron_attn2d.config import RunConfig
from megatron_attn2d.errors import UsageError
from megatron_attn2d.inference import configuration, long_context
from megatron_attn2d.inference.tasks import catalogue
from megatron_attn2d.inference.tasks.filler import Text, from_files
from megatron_attn2d.launch import environment
from megatron_attn2d.run import checkpoints

_DEFAULTS = {"samples": 4, "depths": 11, "digits": 7, "seed": 0, "chunk": 4096}
_READ_BY = {
    "data": ("perplexity",),
    "haystack": ("needle", *sorted(catalogue.IN_TEXT)),
    "questions": ("qa",),
    "depths": ("needle",),
    "digits": ("needle",),
}
"""Options that only some tasks read, and these tasks."""


class Words(argparse.Action):
    """Stores the words after an option; overrides among them, `key.sub=value`, join those of the command."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        """Store `values`, the words after `option`."""
        namespace.intermixed = [*namespace.intermixed, *(word for word in values if "=" in word)]
        setattr(namespace, self.dest, [word for word in values if "=" not in word])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `--tasks` to the parser of `eval`."""
    group = parser.add_argument_group("tasks", "scores on long texts that are made for the purpose; docs/evaluation.md")
    group.add_argument(
        "--tasks", nargs="+", action=Words, metavar="NAME", help="needle, ruler or one of its kinds, perplexity"
    )
    group.add_argument("--depths", type=int, metavar="N", help="of needle, from begin to end (default: 11)")
    group.add_argument("--digits", type=int, metavar="N", help="of the number that needle hides (default: 7)")
    group.add_argument(
        "--haystack", nargs="+", action=Words, metavar="FILE", help="texts that hide needles (default: noise)"
    )
    group.add_argument("--questions", metavar="JSONL", help="for qa: question, answers and documents per line")
    group.add_argument("--seed", type=int, metavar="N", help="of the haystacks (default: 0)")
    group.add_argument("--chunk", type=int, metavar="N", help="tokens that a rank computes at once (default: 4096)")


def refuse_options(args: argparse.Namespace) -> None:
    """Raise UsageError where an option of `--tasks` is given without it."""
    for name in ("depths", "digits", "haystack", "questions", "seed", "chunk"):
        if getattr(args, name) is not None:
            raise UsageError(f"--{name}: is about tasks; give --tasks too, or leave it out")


def contexts(words: Sequence[str]) -> tuple[int, ...]:
    """The contexts that `--context` names, ascending.

    Raises:
        UsageError: one is no number of tokens.
    """
    for word in words:
        if not word.isdecimal() or int(word) < 1:
            raise UsageError(f"--context {word}: choose 1 or more tokens")
    return tuple(sorted({int(word) for word in words}))


def run_tasks(args: argparse.Namespace, asked: tuple[int, ...]) -> int:
    """Evaluate `args.tasks` at the contexts `asked`, on ranks that it starts, or as one rank of a launcher.

    Returns:
        The exit code.
    """
    world_size = environment.launched_world_size()
    run_dir, names = Path(args.run), catalogue.chosen(args.tasks)
    _refuse_unread(args, names)
    options = {name: _number(args, name) for name in _DEFAULTS}
    run = configuration.configuration(run_dir, args.overrides, world_size)
    step = checkpoints.chosen(run_dir / "checkpoints", args.step)
    output = Path(args.output or run_dir / "eval-tasks.json")
    check_output(output)
    if output.suffix == ".png":
        raise UsageError(f"--output {output}: is the JSON file's name, and of the picture beside it; end it with .json")
    with ExitStack() as stack:
        prefix = None
        if "perplexity" in names:
            if args.data is None:
                raise UsageError("--tasks perplexity: is of a text of yours; give --data, a data set or a file")
            prefix = Path(stack.enter_context(data_set(args.data, args.key, run, launched=world_size is not None)))
            samples(prefix, asked[-1], options["samples"])  # refuses a text that is too short
            if asked[0] < 2:
                raise UsageError(f"--context {asked[0]}: perplexity takes two tokens at least; choose 2 or more")
        request = long_context.Request(
            tasks=tuple(names),
            contexts=asked,
            samples=options["samples"],
            depths=options["depths"],
            digits=options["digits"],
            seed=options["seed"],
            haystack=_text(args.haystack, args.key),
            questions=Path(args.questions) if args.questions else None,
            data=prefix,
            run_dir=run_dir,
            step=step,
            output=output,
            picture=output.with_suffix(".png"),
        )
        _check(request, run)
        environment.apply_variables(run.environment.device, run.environment.variables)
        arguments = configuration.arguments(run, step)
        target = partial(long_context.main, request, run, options["chunk"])
        return on_ranks(run, target, arguments, launched=world_size is not None)


def _check(request: long_context.Request, run: RunConfig) -> None:
    """Raise UsageError, before ranks start, where a task lacks its text or a context suits neither it nor the model."""
    from megatron_attn2d.inference.text import Tokenizer

    positions, longest = run.model.max_position_embeddings, request.contexts[-1]
    if run.model.position_embedding_type == "learned_absolute" and positions is not None and longest > positions:
        raise UsageError(f"--context {longest}: the run has learned {positions} positions; choose {positions} or less")
    fitted = long_context.Fitted(Tokenizer(run.data), request.seed)
    for task in long_context.tasks_of(request):
        fitted.haystack(task, request.contexts[0], 0)
        if task.most is not None:  # the documents may be too few for the longest context
            for sample in range(request.samples):
                fitted.haystack(task, request.contexts[-1], sample)


def _refuse_unread(args: argparse.Namespace, names: Sequence[str]) -> None:
    """Raise UsageError where an option is given that none of the tasks `names` reads."""
    if args.buckets is not None:
        raise UsageError("--buckets: is about loss by position; leave it out, or --tasks")
    for option, readers in _READ_BY.items():
        if getattr(args, option) is not None and not set(readers) & set(names):
            raise UsageError(
                f"--{option}: none of --tasks {' '.join(names)} reads it; add {' or '.join(readers)}, or leave it out"
            )


def _number(args: argparse.Namespace, name: str) -> int:
    given = getattr(args, name)
    least = 0 if name == "seed" else 1
    if given is not None and given < least:
        raise UsageError(f"--{name} {given}: choose {least} or more")
    return _DEFAULTS[name] if given is None else int(given)


def _text(files: Sequence[str] | None, key: str | None) -> Text | None:
    return from_files([Path(file) for file in files], key or "text") if files else None

"""`megatron-attn2d data build`, `data inspect` and `data needles`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from megatron_attn2d.config.prefixes import prefix_fault
from megatron_attn2d.errors import UsageError

TOKENIZERS = ("bytes", "huggingface", "sentencepiece", "tiktoken")


def add(commands: Any) -> list[argparse.ArgumentParser]:
    """Add `data` to the command line's `commands`, and return the parsers of its own commands."""
    data = commands.add_parser("data", help="make and look at data sets").add_subparsers(required=True, metavar="WHAT")

    build = data.add_parser("build", help="text, JSONL or Parquet files to .bin/.idx", description=_build.__doc__)
    build.add_argument("files", nargs="+", metavar="FILE", help="or a folder; .txt, .md, .jsonl, .parquet; .gz, .zst")
    build.add_argument("-o", "--output", required=True, metavar="PREFIX", help="writes PREFIX.bin, .idx and .json")
    _add_tokenizer(build, "bytes")
    build.add_argument(
        "--format",
        choices=("text", "sft"),
        default="text",
        help="sft: JSON lines of prompt and completion, or of chat messages (default: text)",
    )
    build.add_argument("--longest", type=int, metavar="N", help="leave out documents of more tokens, and count them")
    build.add_argument("--key", default="text", help="of the text in a JSON line, or its column (default: text)")
    build.add_argument(
        "--processes", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="default: one per core"
    )
    build.add_argument("--skip-bad", action="store_true", help="leave bad documents out, and count them")
    build.add_argument("--overwrite", action="store_true", help="replace a data set of that name")
    build.set_defaults(command=_build)

    inspect = data.add_parser("inspect", help="what a data set holds", description=_inspect.__doc__)
    inspect.add_argument("prefix", metavar="PREFIX")
    inspect.add_argument("--document", type=int, default=0, metavar="N", help="which to show (default: 0)")
    inspect.add_argument("--plot", metavar="PNG", help="draw the histogram of the documents' lengths")
    inspect.add_argument("--tokens", type=int, default=64, metavar="N", help="how many of it (default: 64)")
    _add_tokenizer(inspect, None)
    inspect.set_defaults(command=_inspect)

    needles = data.add_parser("needles", help="a data set to learn retrieval from", description=_needles.__doc__)
    needles.add_argument("-o", "--output", required=True, metavar="PREFIX", help="and PREFIX-tokenizer, of its words")
    needles.add_argument("--tokens", type=int, default=2_000_000, metavar="N", help="in all (default: 2000000)")
    needles.add_argument("--context", type=int, default=1024, metavar="N", help="of a document (default: 1024)")
    needles.add_argument("--digits", type=int, default=2, metavar="N", help="of the numbers (default: 2)")
    needles.add_argument("--seed", type=int, default=0, metavar="N", help="of the documents (default: 0)")
    needles.set_defaults(command=_needles)
    return [build, inspect, needles]


def _add_tokenizer(parser: argparse.ArgumentParser, default: str | None) -> None:
    note = default or "what PREFIX.json says"
    parser.add_argument("--tokenizer", choices=TOKENIZERS, default=default, help=f"default: {note}")
    parser.add_argument("--tokenizer-model", metavar="PATH", help="file or folder of the tokenizer, on local disk")
    parser.add_argument("--vocab-size", type=int, metavar="N", help="for tiktoken: ids, special ones included")


def _choice(args: argparse.Namespace) -> Any:
    from megatron_attn2d.data.tokenizers import TokenizerChoice

    return TokenizerChoice(args.tokenizer, args.tokenizer_model, args.vocab_size)


def _named_prefix(text: str) -> Path:
    """The prefix of a data set that a user gave.

    Raises:
        UsageError: it has no name.
    """
    if fault := prefix_fault(text):
        raise UsageError(f"{text}: {'; '.join(fault)}")
    return Path(text)


def _build(args: argparse.Namespace) -> int:
    """Tokenize files into a data set that a run's data.paths names."""
    from megatron_attn2d.config.yaml_io import dump
    from megatron_attn2d.data import tokenizers
    from megatron_attn2d.data.build import build, counted

    choice = _choice(args)
    built = build(
        [Path(file) for file in args.files],
        _named_prefix(args.output),
        choice,
        key=args.key,
        format=args.format,
        longest=args.longest,
        processes=args.processes,
        on_bad="skip" if args.skip_bad else "fatal",
        overwrite=args.overwrite,
        console=sys.stderr,
    )
    predicted = "" if built.predicted is None else f", of which {built.predicted:,} are to be predicted"
    print(f"{args.output}: {built.documents:,} documents, {built.tokens:,} tokens{predicted}")
    if built.skipped:
        print(f"left out: {counted(built.skipped)}")
    print("In a run's YAML:")
    kind = {} if args.format == "text" else {"format": args.format}
    print(dump({"data": {"paths": [args.output], **kind, **tokenizers.yaml_section(choice)}}), end="")
    return 0


def _inspect(args: argparse.Namespace) -> int:
    """Print the numbers of a data set and the beginning of one of its documents, decoded."""
    from megatron_attn2d.data.inspect import report

    if args.tokenizer is None and (args.tokenizer_model or args.vocab_size):
        raise UsageError("--tokenizer-model and --vocab-size describe a --tokenizer, which is not given; name it too")
    choice = _choice(args) if args.tokenizer else None
    plot = Path(args.plot) if args.plot else None
    for line in report(_named_prefix(args.prefix), choice, args.document, args.tokens, plot):
        print(line)
    return 0


def _needles(args: argparse.Namespace) -> int:
    """Make a data set of hidden numbers, questions for them and answers, for the run configs/runs/needle_tiny.yaml."""
    from megatron_attn2d.inference.tasks import training

    prefix = _named_prefix(args.output)
    built = training.write(training.Needlework(args.tokens, args.context, args.digits, args.seed), prefix)
    tokens = len(training.vocabulary(args.digits))
    print(f"{prefix}: {built.documents:,} documents, {built.tokens:,} tokens; {tokens} words in the tokenizer")
    return 0

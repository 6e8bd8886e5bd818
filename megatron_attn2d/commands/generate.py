"""`megatron-attn2d generate`: texts continued by a run's checkpoint, on the ranks that trained it or on others."""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_attn2d.commands.evaluation_data import check_output
from megatron_attn2d.commands.on_ranks import on_ranks
from megatron_attn2d.errors import UsageError
from megatron_attn2d.launch import environment
from megatron_attn2d.run import checkpoints

if TYPE_CHECKING:
    from megatron_attn2d.inference.sampling import Sampling


def add(commands: Any) -> list[argparse.ArgumentParser]:
    """Add `generate` to the command line's `commands`, and return its parser."""
    parser = commands.add_parser("generate", help="continue texts", description=_generate.__doc__)
    parser.add_argument("run", metavar="RUN_DIR")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="override keys of the run's config.yaml")
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--prompt", metavar="TEXT", help="a text to continue; the new text is shown as it comes")
    given.add_argument("--prompts", metavar="FILE.jsonl", help='a text per line: {"prompt": TEXT}')
    parser.add_argument("--max-tokens", type=int, default=64, metavar="N", help="new tokens (default: %(default)s)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0, the default: always the likeliest"
    )
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="draw among tokens that sum to P")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="draw among the K likeliest tokens")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the draws (default: %(default)s)")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before it; may be repeated")
    parser.add_argument("--step", type=int, metavar="N", help="of the checkpoint (default: the last complete one)")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="prompts at once (default: %(default)s)")
    parser.add_argument("--chunk", type=int, default=4096, metavar="N", help="tokens of prompts per rank and pass")
    parser.add_argument(
        "-o", "--output", metavar="JSONL", help="a line per prompt: text, tokens, logprobs, stop_reason"
    )
    parser.set_defaults(command=_generate)
    return [parser]


def _generate(args: argparse.Namespace) -> int:
    """Continue texts by a run's checkpoint; parallelism.* and context_parallel.* of the run may be overridden."""
    from megatron_attn2d.inference import configuration

    world_size = environment.launched_world_size()
    run_dir = Path(args.run)
    run = configuration.configuration(run_dir, args.overrides, world_size)
    step = checkpoints.chosen(run_dir / "checkpoints", args.step)
    texts = [args.prompt] if args.prompts is None else _read(Path(args.prompts))
    if args.output:
        check_output(Path(args.output))
        if args.prompts is not None and Path(args.output).resolve() == Path(args.prompts).resolve():
            raise UsageError(f"--output {args.output}: holds the prompts; choose another file")
    environment.apply_variables(run.environment.device, run.environment.variables)
    from megatron_attn2d.inference.completions import Request, check, main

    request = Request(run, texts, _sampling(args), args.batch, args.chunk, args.output)
    check(request)
    arguments = configuration.arguments(run, step)
    return on_ranks(run, partial(main, request), arguments, launched=world_size is not None)


def _sampling(args: argparse.Namespace) -> Sampling:
    from megatron_attn2d.inference.sampling import Sampling

    try:
        return Sampling(args.max_tokens, args.temperature, args.top_p, args.top_k, args.seed, tuple(args.stop))
    except ValueError as error:  # its message begins with the field's name
        name, _, rest = str(error).partition(" ")
        raise UsageError(f"--{name.replace('_', '-')} {rest}") from error


def _read(path: Path) -> list[str]:
    texts = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            text = json.loads(line)["prompt"]
        except (ValueError, TypeError, KeyError) as error:
            raise UsageError(f'{path}, line {number}: not a JSON object {{"prompt": TEXT}}') from error
        if not isinstance(text, str):
            raise UsageError(f"{path}, line {number}: the prompt is a {type(text).__name__}; give a text")
        texts.append(text)
    if not texts:
        raise UsageError(f'{path}: empty; give a line {{"prompt": TEXT}} per text')
    return texts

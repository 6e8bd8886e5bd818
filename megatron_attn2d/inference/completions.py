"""What `megatron-attn2d generate` does in each rank: completes the prompts, shows the text, and writes it down."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from megatron_attn2d.config import RunConfig
from megatron_attn2d.errors import UsageError
from megatron_attn2d.inference.generator import Completion, Generator, check_tokens
from megatron_attn2d.inference.sampling import Sampling
from megatron_attn2d.inference.text import Tokenizer


@dataclass(frozen=True)
class Request:
    """What to complete, and how; the model and its checkpoint stand in Megatron's arguments."""

    run: RunConfig
    """Of `configuration.configuration`."""
    texts: list[str]
    """The prompts."""
    sampling: Sampling
    batch: int
    """Prompts at once, on each replica."""
    chunk: int
    """Tokens of prompts per rank and pass."""
    output: str | None
    """JSON lines are written here."""


def check(request: Request) -> None:
    """Raise UsageError, before ranks start, for prompts that can't be completed."""
    tokenizer = Tokenizer(request.run.data)
    for i, text in enumerate(request.texts):
        if not text:
            raise UsageError(f"prompt {i}: empty; give a text of one character or more")
        check_tokens(f"prompt {i}", tokenizer.encode(text), 0, request.sampling.max_tokens, tokenizer, request.run)
    for name, value in (("--batch", request.batch), ("--chunk", request.chunk)):
        if value < 1:
            raise UsageError(f"{name} {value}: choose 1 or more")


def main(request: Request, megatron_args: Sequence[str]) -> None:
    """Completes, as this rank; the first rank shows and writes the texts."""
    with Generator.started(request.run, megatron_args, batch=request.batch, chunk=request.chunk) as generator:
        shows = int(os.environ.get("RANK", "0")) == 0
        console, alone = generator.console, len(request.texts) == 1
        if shows and alone:
            _show(console, request.texts[0])

        def stream(place: int, text: str) -> None:
            if shows and alone:
                _show(console, text)

        completions = generator.generate(request.texts, request.sampling, stream)
        if not shows:
            return
        if alone:
            print(file=console)
        else:
            for i, (text, completion) in enumerate(zip(request.texts, completions, strict=True)):
                print(f"[{i}] {text}{completion.text}", file=console)
        print(f"-- {generator.measured.sentence()}", file=console, flush=True)
        if request.output:
            _write(Path(request.output), request.texts, completions)


def _show(console: TextIO, text: str) -> None:
    print(text, end="", file=console, flush=True)


def _write(path: Path, texts: Sequence[str], completions: Sequence[Completion]) -> None:
    scratch = path.with_name(f"{path.name}.new")
    with scratch.open("w") as file:
        for text, completion in zip(texts, completions, strict=True):
            file.write(json.dumps({"prompt": text, **asdict(completion)}) + "\n")
    scratch.replace(path)

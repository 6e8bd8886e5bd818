"""What `megatron-attn2d generate` does in each rank: completes the prompts, shows the texts, and writes them down.

A text alone is shown token by token, several are shown batch by batch. Lines of the output are written as they are
shown, into a file beside it that takes its name in the end: what was complete before a crash is there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from megatron_attn2d.config import RunConfig
from megatron_attn2d.errors import UsageError
from megatron_attn2d.inference.generator import Generator
from megatron_attn2d.inference.prompts import check_tokens
from megatron_attn2d.inference.results import Completion
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
        try:
            text.encode()
        except UnicodeEncodeError as error:  # bytes of a command line that are no UTF-8, or half a character of JSON
            raise UsageError(f"prompt {i}: no character at place {error.start}; give a text in UTF-8") from None
        check_tokens(f"prompt {i}", tokenizer.encode(text), 0, request.sampling.max_tokens, tokenizer, request.run)
    for name, value in (("--batch", request.batch), ("--chunk", request.chunk)):
        if value < 1:
            raise UsageError(f"{name} {value}: choose 1 or more")


def main(request: Request, megatron_args: Sequence[str]) -> None:
    """Completes, as this rank; the first rank shows and writes the texts."""
    shows = int(os.environ.get("RANK", "0")) == 0
    with (
        Generator.started(request.run, megatron_args, batch=request.batch, chunk=request.chunk) as generator,
        _written(request, generator.console if shows else None) as write,
    ):
        console, alone = generator.console, len(request.texts) == 1
        if shows and alone:
            _show(console, request.texts[0])

        def stream(place: int, text: str) -> None:
            if shows and alone:
                _show(console, text)

        def tell(place: int, completion: Completion) -> None:
            if shows:
                write(request.texts[place], completion)
                _show(console, "\n" if alone else f"[{place}] {request.texts[place]}{completion.text}\n")

        generator.generate(request.texts, request.sampling, stream, on_completion=tell)
        if shows:
            print(f"-- {generator.measured.sentence()}", file=console, flush=True)


def _show(console: TextIO, text: str) -> None:
    print(text, end="", file=console, flush=True)


@contextmanager
def _written(request: Request, console: TextIO | None) -> Iterator[Callable[[str, Completion], None]]:
    """Yields what writes a line of the output; nothing is written without `output`, or on ranks without a console."""
    if request.output is None or console is None:
        yield lambda text, completion: None
        return
    path = Path(request.output)
    scratch = path.with_name(f"{path.name}.new")
    lines = 0
    with scratch.open("w") as file:

        def write(text: str, completion: Completion) -> None:
            nonlocal lines
            print(json.dumps({"prompt": text, **asdict(completion)}), file=file, flush=True)
            lines += 1

        try:
            yield write
        except BaseException:
            if lines:
                print(f"-- {lines} of {len(request.texts)} completions are in {scratch}", file=console, flush=True)
            else:
                scratch.unlink()
            raise
    scratch.replace(path)

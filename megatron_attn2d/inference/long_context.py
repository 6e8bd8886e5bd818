"""How well a checkpoint uses a long context: tasks of `tasks.catalogue` and perplexity, scored on context ranks.

A haystack's keys and values are cached once; its questions follow one after the other, each rolled back after its
answer. Data-parallel replicas share the haystacks and windows; the ranks of a replica make the same ones and the same
answers. All answers are gathered after each round of one haystack per replica; rank 0 tells and writes them.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, TextIO

from megatron_attn2d.config import RunConfig
from megatron_attn2d.inference.tasks import catalogue
from megatron_attn2d.inference.tasks.filler import Text
from megatron_attn2d.inference.tasks.haystack import Haystack, Question, Task, fit
from megatron_attn2d.inference.tasks.needle import Needles

if TYPE_CHECKING:  # it imports torch, which a command line that is wrong should not wait for
    from megatron_attn2d.inference.generator import Generator
    from megatron_attn2d.inference.text import Tokenizer

_MORE_TOKENS = 16
"""That an answer may have beside twice as many as the right one: a model may say something before it."""
_NEXT_QUESTION = "\nQuestion:"
"""Where a model that goes on after its answer is stopped."""
_TELL_S = 10.0
"""Seconds after which progress is told again, though no score is complete."""


@dataclass(frozen=True)
class Request:
    """What to evaluate; the run's configuration and the checkpoint's step stand beside it."""

    tasks: tuple[str, ...]
    """Of `catalogue.chosen`."""
    contexts: tuple[int, ...]
    """Tokens of haystack, question and answer; ascending."""
    samples: int
    """Haystacks of each task (of `needle`: each depth) and context; windows for `perplexity`, at most."""
    depths: int
    """How many depths `needle` has, from the beginning of the text to its end."""
    digits: int
    """Of the numbers that `needle` hides."""
    seed: int
    haystack: Text | None
    """Sentences that hide needles; None: noise."""
    questions: Path | None
    """JSONL file for `qa`."""
    data: Path | None
    """Data set for `perplexity`."""
    run_dir: Path
    step: int
    output: Path
    """JSON file for the result."""
    picture: Path
    """PNG for the scores by context."""


@dataclass(frozen=True)
class Answer:
    """A question, what the model said, and its score from 0 to 1."""

    task: str
    context: int
    sample: int
    depth: float | None
    question: str
    answers: list[str]
    said: str
    score: float


@dataclass
class Progress:
    """Tells on the console how far an evaluation is, and about how long the rest takes."""

    console: TextIO | None
    """None: this rank tells nothing."""
    total: int
    """Tokens to fill in, all haystacks together."""
    begun: float = field(default_factory=time.monotonic)
    done: int = 0
    _told: float = 0.0

    def add(self, tokens: int, line: str, *, complete: bool) -> None:
        """`tokens` more are done; tells `line` where a score is complete, or nothing has been told for a while."""
        self.done += tokens
        now = time.monotonic()
        if self.console is None or not (complete or now - self._told >= _TELL_S):
            return
        self._told = now
        left = (now - self.begun) / self.done * (self.total - self.done)
        rest = f"; about {duration(left)} left" if self.done < self.total else ""
        print(f"{line}  ({self.done / self.total:.0%}{rest})", file=self.console, flush=True)


def duration(seconds: float) -> str:
    """`seconds` as a person says it: 40 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def main(request: Request, run: RunConfig, chunk: int, megatron_args: Sequence[str]) -> None:
    """Evaluates, as this rank; rank 0 prints a table, and writes `request.output` and `request.picture`."""
    from megatron_attn2d.inference.generator import Generator

    with Generator.started(run, megatron_args, chunk=chunk) as generator:
        is_first = os.environ.get("RANK", "0") == "0"
        result = evaluate(generator, request, generator.console if is_first else None)
        if is_first:
            print(table(result), file=generator.console, flush=True)  # first: a full disk must not take it along
            write(result, request)


def write(result: dict[str, Any], request: Request) -> None:
    """Writes the JSON file, which appears whole, and then the picture."""
    from megatron_attn2d.inference import heatmap

    scratch = request.output.with_name(f"{request.output.name}.new")
    scratch.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(scratch, request.output)
    heatmap.draw(result, request.picture)


def tasks_of(request: Request) -> list[Task]:
    """The tasks that make haystacks; `needle` once for each of its depths.

    Raises:
        UsageError: a task lacks its text or its questions.
    """
    made: list[Task] = []
    for name in request.tasks:
        if name == "needle":
            depths = [index / max(1, request.depths - 1) for index in range(request.depths)]
            made += catalogue.needles_by_depth(depths, request.haystack, request.digits)
        elif name != "perplexity":
            made.append(catalogue.ruler(name, request.haystack, request.questions))
    return made


def depth_of(task: Task) -> float | None:
    """Where `needle` puts its needle; None for other tasks."""
    return task.depth if isinstance(task, Needles) else None


class Fitted:
    """Haystacks in tokens of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer, seed: int) -> None:
        """`seed` chooses the haystacks."""
        self._tokenizer, self._seed = tokenizer, seed

    def haystack(self, task: Task, context: int, sample: int) -> Haystack:
        """That of number `sample`: it fills `context` tokens, room for the longest answer included.

        Raises:
            UsageError: the context is too short for the task.
        """
        seed = f"{self._seed}/{task.name}/{depth_of(task)}/{sample}"  # the same needles in every context
        return fit(task, context, lambda text: len(self.tokens(text)), seed, self.answer_tokens)

    def tokens(self, text: str, *, begins: bool = False) -> list[int]:
        """Those of `text`, with what the tokenizer puts before a text where it begins one."""
        return self._tokenizer.encode(text, begins=begins)

    def answer_tokens(self, question: Question) -> int:
        """How many tokens a model may say in answer."""
        return 2 * len(self.tokens(question.solution)) + _MORE_TOKENS


@dataclass(frozen=True)
class _Job:
    """One haystack with its questions, or one window of the data set."""

    context: int
    sample: int
    task: Task | None
    """None: a window for `perplexity`."""


def evaluate(generator: Generator, request: Request, console: TextIO | None) -> dict[str, Any]:
    """The result as it is written; `console` is told how far it is. Every rank calls, and gets the same.

    Raises:
        UsageError: a context is too short for a task, or too long for the model's positions or the ranks' memory.
    """
    generator.check_length(max(request.contexts))  # before the first is filled in
    fitted = Fitted(generator.tokenizer, request.seed)
    makes: list[Task | None] = [*tasks_of(request), *([None] if "perplexity" in request.tasks else [])]
    jobs = [
        _Job(context, sample, task)
        for context in request.contexts
        for task in makes
        for sample in range(request.samples)
    ]
    progress = Progress(console, sum(job.context for job in jobs))
    answers: list[Answer] = []
    perplexity: dict[str, dict[str, float]] = {}
    scores: list[float] = []
    losses: list[list[float]] = []
    for begin in range(0, len(jobs), generator.replicas):
        mine = begin + generator.replica
        found = {mine: _done(generator, fitted, request, jobs[mine])} if mine < len(jobs) else {}
        for place, result in sorted(generator.gathered(found).items()):
            job = jobs[place]
            if job.sample == 0:
                scores, losses = [], []
            if job.task is None:
                losses += [result] if result else []
                perplexity[str(job.context)] = _perplexity(losses)
                line = f"perplexity, {job.context:,} tokens: {perplexity[str(job.context)]['perplexity']:.3f}"
            else:
                answers += result
                scores += [answer.score for answer in result]
                at = "" if (depth := depth_of(job.task)) is None else f" at depth {depth:.0%}"
                line = f"{job.task.name}, {job.context:,} tokens{at}: {fmean(scores):.0%}"
            progress.add(job.context, line, complete=job.sample == request.samples - 1)
    return summary(request, answers, perplexity)


def _done(generator: Generator, fitted: Fitted, request: Request, job: _Job) -> list[Any]:
    """The answers to a haystack's questions, or the loss of each token of a window, as this replica finds them."""
    if job.task is not None:
        return _answers(generator, fitted, job.task, job.context, job.sample)
    from megatron_attn2d.training.evaluation import windows

    assert request.data is not None, "the command line has asked for it"
    if (window := next(windows(request.data, job.context, job.sample), None)) is None:
        return []  # the data set has fewer windows
    (logprobs,) = generator.score([window["tokens"][0].tolist()], shared=False)
    return [-logprob for logprob in logprobs]


def _answers(generator: Generator, fitted: Fitted, task: Task, context: int, sample: int) -> list[Answer]:
    from megatron_attn2d.inference.sampling import Sampling

    made = fitted.haystack(task, context, sample)
    room = max(len(fitted.tokens(question.text)) + fitted.answer_tokens(question) for question in made.questions)
    cache = generator.prefill([fitted.tokens(made.text, begins=True)], room=room)
    found = []
    for question in made.questions:
        sampling = Sampling(max_tokens=fitted.answer_tokens(question), stop=(_NEXT_QUESTION,))
        asked = [fitted.tokens(question.text)]
        (completion,) = generator.generate(asked, sampling, after=cache, shared=False)
        said = completion.text
        depth = question.depth if depth_of(task) is None else depth_of(task)
        found.append(
            Answer(task.name, context, sample, depth, question.text, list(question.answers), said, question.score(said))
        )
    return found


def _perplexity(windows: Sequence[Sequence[float]]) -> dict[str, float]:
    """Of the losses of windows' tokens: over all, and over the last quarter of each window."""
    losses = [loss for window in windows for loss in window]
    last = [loss for window in windows for loss in window[-max(1, (len(window) + 1) // 4) :]]
    return {
        "windows": len(windows),
        "loss": fmean(losses),
        "perplexity": math.exp(fmean(losses)),
        "perplexity_of_last_quarter": math.exp(fmean(last)),
    }


def summary(request: Request, answers: Sequence[Answer], perplexity: dict[str, dict[str, float]]) -> dict[str, Any]:
    """What is written: scores from 0 to 1 by task and context, by depth for `needle`, and every answer."""
    names = list(dict.fromkeys(answer.task for answer in answers))

    def mean(task: str, context: int, depth: float | None = None) -> float:
        return fmean(
            answer.score
            for answer in answers
            if (answer.task, answer.context) == (task, context) and depth in (None, answer.depth)
        )

    depths = sorted({answer.depth for answer in answers if answer.task == "needle" and answer.depth is not None})
    return {
        "run": str(request.run_dir),
        "step": request.step,
        "contexts": list(request.contexts),
        "samples": request.samples,
        "seed": request.seed,
        "scores": {name: {str(context): mean(name, context) for context in request.contexts} for name in names},
        "needle": {
            "depths": depths,
            "scores": [[mean("needle", context, depth) for context in request.contexts] for depth in depths],
        }
        if depths
        else None,
        "perplexity": perplexity or None,
        "answers": [asdict(answer) for answer in answers],
    }


def table(result: dict[str, Any]) -> str:
    """`result` as a user reads it: a row per task, a column per context; scores in percent."""
    contexts = [str(context) for context in result["contexts"]]
    rows = [["", *(f"{int(context):,}" for context in contexts)]]
    scores = result["scores"]
    rows += [[name, *(f"{100 * of[context]:.1f}" for context in contexts)] for name, of in scores.items()]
    ruler = [of for name, of in scores.items() if name in catalogue.RULER]
    if len(ruler) > 1:
        rows.append([f"mean of RULER's {len(ruler)}", *(f"{100 * fmean(of[c] for of in ruler):.1f}" for c in contexts)])
    if result["perplexity"]:
        for key in ("perplexity", "perplexity_of_last_quarter"):
            rows.append([key.replace("_", " "), *(f"{result['perplexity'][c][key]:.3f}" for c in contexts)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])

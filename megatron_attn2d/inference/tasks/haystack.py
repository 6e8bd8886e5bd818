"""A long text and questions about it: what every task makes, how it is fitted to a context, how answers are scored.

        instruction | text ........ needle ........ text | question, beginning of the answer -> the model goes on
        <-- Haystack.text: its keys and values are cached once -->  <------ one Question each ------>

A task makes the same haystack from the same random numbers at any size; `fit` finds the size that fills a context.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal, Protocol

from megatron_attn2d.errors import UsageError

Count = Callable[[str], int]
"""Tokens of a text."""


@dataclass(frozen=True)
class Question:
    """A question about a haystack."""

    text: str
    """Follows the haystack, and ends where the model's answer begins."""
    answers: tuple[str, ...]
    wanted: Literal["all", "any"] = "all"
    """Whether the answers are parts of one, or ways to say it."""
    depth: float | None = None
    """Where in the text the answer is, from 0 (at its beginning) to 1; None: in several places."""

    def score(self, said: str) -> float:
        """The share of `answers` that occur in `said` (of `any`: 1 where one does), whatever their case."""
        found = [answer.lower() in said.lower() for answer in self.answers]
        return float(any(found)) if self.wanted == "any" else sum(found) / len(found)

    @property
    def solution(self) -> str:
        """What a model that knows the answers says."""
        return " " + (self.answers[0] if self.wanted == "any" else ", ".join(self.answers))


@dataclass(frozen=True)
class Haystack:
    """A long text, and questions about it."""

    text: str
    questions: tuple[Question, ...]

    def solved(self) -> str:
        """The text, and every question with its answer: what a model may be trained on."""
        return self.text + "".join(f"{question.text}{question.solution}.\n" for question in self.questions)


class Task(Protocol):
    """Makes haystacks of one kind."""

    @property
    def name(self) -> str:
        """As in `--tasks`."""

    @property
    def most(self) -> int | None:
        """The largest size there is; None: any."""

    def haystack(self, size: int, random: Random) -> Haystack:
        """A haystack of `size` units (sentences, words, documents), 0 or more; the same for equal `random`."""


def fit(task: Task, context: int, count: Count, seed: str, answer_tokens: Callable[[Question], int]) -> Haystack:
    """A haystack of `task` that, with its longest question and answer, fills `context` tokens, up to 1/256 of them.

    Args:
        task: what makes it.
        context: tokens of haystack, question and answer.
        count: tokens of a text.
        seed: of the random numbers; the same seed is the same needles at every context.
        answer_tokens: how many tokens an answer may take.

    Raises:
        UsageError: the context does not hold the smallest one, or the largest one leaves more than a tenth of it empty.
    """

    def tokens(size: int) -> int:
        made = task.haystack(size, Random(seed))
        return count(made.text) + max(count(question.text) + answer_tokens(question) for question in made.questions)

    fits, used = 0, tokens(0)
    if used > context:
        raise UsageError(
            f"--context {context}: {task.name} takes {used} tokens or more; choose a longer context, or other tasks"
        )
    size = 1
    while task.most is None or fits < task.most:
        too_large = size if task.most is None else min(size, task.most)
        if (over := tokens(too_large)) > context:
            break
        growth = (context - used) / max(1, over - used)  # tokens grow evenly with the size
        size = too_large + max(1, int(1.1 * growth * (too_large - fits)))
        fits, used = too_large, over
    else:
        if context - used > context // 10:  # its score would stand under a context that it does not have
            raise UsageError(
                f"--context {context}: all that {task.name} is made of takes {used} tokens; give more of it, choose a "
                "shorter context, or other tasks"
            )
        return task.haystack(fits, Random(seed))
    while too_large - fits > 1 and context - used > context // 256:
        between = fits + (too_large - fits) * (context - used) // (over - used)
        middle = min(max(between, fits + 1), too_large - 1)
        if (taken := tokens(middle)) <= context:
            fits, used = middle, taken
        else:
            too_large, over = middle, taken
    return task.haystack(fits, Random(seed))


def spread(units: Sequence[str], needles: Sequence[str], places: Sequence[int]) -> list[str]:
    """`units` with each needle before the unit of that place; needles of one place keep their order."""
    order = sorted(range(len(needles)), key=lambda index: (places[index], index))
    spread_out, taken = [], 0
    for index in order:
        spread_out += [*units[taken : places[index]], needles[index]]
        taken = places[index]
    return [*spread_out, *units[taken:]]

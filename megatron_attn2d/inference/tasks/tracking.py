"""Variable tracking: a chain of assignments spread over a long text; which variables hold the value?"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from random import Random
from string import ascii_uppercase

from megatron_attn2d.inference.tasks.filler import NOISE, Text, distinct
from megatron_attn2d.inference.tasks.haystack import Haystack, Question, spread

_WORKED = 4
"""Sentences of the worked example."""


@dataclass(frozen=True)
class VariableTracking:
    """`VAR A = 12345` and `hops` assignments `VAR B = VAR A` after it, in order, for each of `chains` chains.

    An example with its answer comes first, as a model that was never taught to answer wouldn't know what to list.
    """

    name: str = "vt"
    text: Text = NOISE
    chains: int = 1
    hops: int = 4
    most: int | None = None

    def haystack(self, size: int, random: Random) -> Haystack:
        """A haystack of `size` sentences."""
        variables = _variables(2 * self.chains * (self.hops + 1), random)
        values = distinct("numbers", 2 * self.chains, random, digits=5)
        half = len(variables) // 2
        example = self._exercise(_WORKED, variables[:half], values[: self.chains], random).solved()
        asked = self._exercise(size, variables[half:], values[self.chains :], random)
        return Haystack(f"{example}\n{asked.text}", asked.questions)

    def _exercise(self, size: int, variables: list[str], values: list[str], random: Random) -> Haystack:
        needles, places, questions = [], [], []
        for chain, value in enumerate(values):
            names = variables[chain * (self.hops + 1) :][: self.hops + 1]
            needles += [f"VAR {names[0]} = {value}."]
            needles += [f"VAR {name} = VAR {before}." for before, name in pairwise(names)]
            places += sorted(round(random.random() * size) for _ in names)
            asked = (
                f"\nQuestion: Which variables hold the value {value}?"
                f"\nAnswer: The {len(names)} variables that hold the value {value} are"
            )
            questions.append(Question(asked, tuple(names)))
        text = " ".join(spread(self.text.take(size, random), needles, places))
        return Haystack(f"Follow the assignments of variables in the text.\n{text}", tuple(questions))


def _variables(number: int, random: Random) -> list[str]:
    """`number` different names of five letters."""
    drawn: dict[str, None] = {}
    while len(drawn) < number:
        drawn["".join(random.choices(ascii_uppercase, k=5))] = None
    return list(drawn)

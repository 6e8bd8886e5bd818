"""Needles in a haystack: facts hidden in a long text, and questions for some of them."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Literal

from megatron_attn2d.inference.tasks.filler import Kind, Text, distinct
from megatron_attn2d.inference.tasks.haystack import Haystack, Question, spread

_INTRODUCTION = "Secret {kind} are hidden in the following text. Remember them.\n"


@dataclass(frozen=True)
class Needles:
    """Facts `The secret number of KEY is VALUE.` in a text of sentences, or among other such facts.

    A haystack has `keys` keys with `values` values each. Its questions ask for every key alone, or one asks for all of
    `asked_together` keys.
    """

    name: str
    text: Text | Literal["needles"]
    """What hides the facts; `needles`: facts about other keys."""
    key_kind: Kind = "words"
    value_kind: Kind = "numbers"
    keys: int = 1
    values: int = 1
    asked_together: int = 1
    depth: float | None = None
    """Of the first key's first value, from 0 to 1; None: anywhere."""
    digits: int = 7
    most: int | None = None

    def haystack(self, size: int, random: Random) -> Haystack:
        """A haystack of `size` sentences."""
        noun = {"numbers": "number", "words": "word", "uuids": "code"}[self.value_kind]
        depths = [random.random() for _ in range(self.keys * self.values)]
        if self.depth is not None:
            depths[0] = self.depth
        others = size if self.text == "needles" else 0
        keys = distinct(self.key_kind, self.keys + others, random)
        values = distinct(self.value_kind, self.keys * self.values + others, random, self.digits)
        hidden = {key: values[index * self.values :][: self.values] for index, key in enumerate(keys[: self.keys])}
        needles = [_fact(noun, key, value) for key, of_key in hidden.items() for value in of_key]
        if isinstance(self.text, Text):
            units = self.text.take(size, random)
        else:
            units = [_fact(noun, *fact) for fact in zip(keys[self.keys :], values[len(needles) :], strict=True)]
        text = " ".join(spread(units, needles, [round(depth * size) for depth in depths]))
        introduction = _INTRODUCTION.format(kind=f"{noun}s")
        return Haystack(introduction + text, tuple(self._questions(noun, hidden, depths)))

    def _questions(self, noun: str, hidden: dict[str, list[str]], depths: list[float]) -> list[Question]:
        keys = list(hidden)
        plural = self.values * self.asked_together > 1
        made = []
        for first in range(0, len(keys), self.asked_together):
            together = keys[first : first + self.asked_together]
            subject = f"The secret {noun}{'s' * plural} of {_listed(together)} {'are' if plural else 'is'}"
            asked = f"What {'are' if plural else 'is'} t{subject[1:].removesuffix(' are' if plural else ' is')}?"
            answers = tuple(value for key in together for value in hidden[key])
            made.append(
                Question(f"\nQuestion: {asked}\nAnswer: {subject}", answers, depth=None if plural else depths[first])
            )
        return made


def _fact(noun: str, key: str, value: str) -> str:
    return f"The secret {noun} of {key} is {value}."


def _listed(items: list[str]) -> str:
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + f" and {items[-1]}"

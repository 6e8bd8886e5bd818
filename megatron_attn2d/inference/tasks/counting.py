"""Counting words: which words of a long list are the common ones?"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from string import ascii_lowercase

from megatron_attn2d.inference.tasks.filler import distinct
from megatron_attn2d.inference.tasks.haystack import Haystack, Question


@dataclass(frozen=True)
class CommonWords:
    """A shuffled, numbered list in which `common` words stand `often` times each, and all others `seldom` times.

    A short list with its answer comes first. The size is the number of the other words.
    """

    name: str = "cwe"
    common: int = 10
    often: int = 30
    seldom: int = 3
    most: int | None = None

    def haystack(self, size: int, random: Random) -> Haystack:
        """A haystack with `size` words that are not common."""
        example = self._exercise(distinct("words", 2 * self.common, random), 3, 1, random).solved()
        asked = self._exercise(distinct("words", self.common + size, random), self.often, self.seldom, random)
        return Haystack(f"{example}\n{asked.text}", asked.questions)

    def _exercise(self, words: list[str], often: int, seldom: int, random: Random) -> Haystack:
        common, others = words[: self.common], words[self.common :]
        drawn = [*common * often, *others * seldom]
        random.shuffle(drawn)
        listed = " ".join(f"{number}. {word}" for number, word in enumerate(drawn, 1))
        asked = (
            f"\nQuestion: Which {self.common} words stand most often in the list?"
            f"\nAnswer: The {self.common} words that stand most often in the list are"
        )
        return Haystack(
            f"Remember the words that stand often in this list.\n{listed}", (Question(asked, tuple(common)),)
        )


@dataclass(frozen=True)
class FrequentWords:
    """A coded text, in which the word of rank r occurs in proportion to 1 / r ** `exponent`; the first is dots.

    The question is for the `asked` most frequent words after the dots. The size is the number of words.
    """

    name: str = "fwe"
    asked: int = 3
    vocabulary: int = 200
    exponent: float = 2.0
    most: int | None = None

    def haystack(self, size: int, random: Random) -> Haystack:
        """A haystack of `size` words, and those that keep the most frequent ones apart."""
        coded: dict[str, None] = {}
        while len(coded) < self.vocabulary - 1:
            coded["".join(random.choices(ascii_lowercase, k=random.randrange(4, 8)))] = None
        shares = [rank**-self.exponent for rank in range(1, self.vocabulary + 1)]
        # One more for each rank before the first that isn't asked for: however short the text, the ranks are apart.
        apart = [max(0, self.asked + 1 - index) for index in range(self.vocabulary)]
        counts = [int(size * share / sum(shares)) + more for share, more in zip(shares, apart, strict=True)]
        drawn = [word for word, count in zip(["...", *coded], counts, strict=True) for _ in range(count)]
        random.shuffle(drawn)
        asked = (
            f"\nQuestion: Which {self.asked} words occur most often in the coded text?"
            f"\nAnswer: The {self.asked} words that occur most often in the coded text are"
        )
        introduction = "Count the words of this coded text, and leave the dots out.\n"
        answers = tuple(coded)[: self.asked]
        return Haystack(introduction + " ".join(drawn), (Question(asked, answers),))

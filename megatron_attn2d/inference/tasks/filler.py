"""What haystacks are made of: sentences of local text or of no interest, and made-up names and numbers."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal
from uuid import UUID

from megatron_attn2d.data.readers import BadDocument, find_files, read
from megatron_attn2d.errors import UsageError

Kind = Literal["numbers", "words", "uuids"]
"""Of keys and values."""

_NOISE = (
    "The rain fell on the roof all night.",
    "A cat slept beside the warm stove.",
    "Bread was baked before the sun rose.",
    "The road ran along the river to the town.",
    "Boats came home with the evening tide.",
)
_ADJECTIVES = re.findall(
    r"\w+",
    """
    amber ancient bitter blue bold brave brisk broad calm careful clear clever cold copper crimson curious damp
    daring deep distant dusty eager early earnest empty faint fair famous fierce fine fond fresh frosty gentle
    giant glad golden grand green happy hasty heavy hidden hollow honest humble icy idle jolly keen kind large
    late lively lonely loud lucky mellow merry mighty modest narrow neat nimble noble odd old pale patient plain
    polite proud purple quick quiet rapid rare ready rough royal rusty scarlet secret sharp shy silent silver
    simple sleepy slow smooth soft solid steady still sturdy sunny sweet swift tall tame tender tidy tiny urban
    vast velvet violet vivid warm wild wise young
    """,
)
_NOUNS = re.findall(
    r"\w+",
    """
    anchor apple arrow badge barn basket beacon bell bench blanket boat bottle branch bridge brook bucket button
    cabin candle canyon carpet castle cedar chapel cherry cliff clock cloud coast comet cottage cradle crown
    desert door dragon drum eagle engine falcon feather fence fiddle field forest fountain garden gate glacier
    goose guitar hammer harbor hat hill honey horse island ivory jacket jewel kettle kite ladder lake lantern
    lemon letter lion lizard marble market meadow melon mirror monkey moon mountain needle nest oak ocean
    orchard otter owl paddle palace panda paper pearl pencil pepper piano pillow planet pocket pond quarry
    rabbit raven ribbon river robin rocket saddle sail school shadow shell ship shovel spider spoon squirrel
    stable star stone summer table temple tiger tower tractor trumpet tunnel turtle umbrella valley village
    violin wagon walnut whale wheel willow window winter wolf yarn zebra
    """,
)
_LONGEST = 400
"""Characters of a sentence, after which text without sentences is cut between words."""


@dataclass(frozen=True)
class Text:
    """Sentences in order, from which a haystack takes as many as it wants, from a place of its own."""

    sentences: Sequence[str]

    def take(self, size: int, random: Random) -> list[str]:
        """`size` sentences from a random one on; the text begins anew where it ends."""
        begin = random.randrange(len(self.sentences))
        return [self.sentences[(begin + index) % len(self.sentences)] for index in range(size)]


NOISE = Text(_NOISE)
"""A few sentences again and again: no text has to be there, and only the needle is new."""


def from_files(paths: Sequence[Path], key: str) -> Text:
    """The sentences of text, JSONL (of the member `key`) or Parquet files, in order.

    Raises:
        UsageError: a file can't be read, or there is no sentence.
    """
    sentences: list[str] = []
    for file in find_files(paths):
        for raw in read(file, key):
            try:
                sentences += split_sentences(raw.text(key))
            except BadDocument as error:
                raise UsageError(f"--haystack {raw.where}: {error}") from None
    if not sentences:
        raise UsageError(f"--haystack {' '.join(map(str, paths))}: no text in it; choose other files")
    return Text(sentences)


def split_sentences(text: str) -> list[str]:
    """The sentences of `text`, each on one line; what has none is cut between words."""
    sentences = []
    for sentence in re.split(r"(?<=[.!?])\s+|\n\s*\n", text):
        words = sentence.split()
        while words:
            taken = length = 0
            while taken < len(words) and (not taken or length + len(words[taken]) < _LONGEST):
                length += len(words[taken]) + 1
                taken += 1
            sentences.append(" ".join(words[:taken]))
            words = words[taken:]
    return sentences


def distinct(kind: Kind, number: int, random: Random, digits: int = 7) -> list[str]:
    """`number` different keys or values; numbers have `digits` digits."""
    many = number > len(_ADJECTIVES) * len(_NOUNS) // 4  # drawing them would take long: a second adjective helps
    make: dict[Kind, Callable[[], str]] = {
        "numbers": lambda: str(random.randrange(10 ** (digits - 1), 10**digits)),
        "words": lambda: "-".join(random.choice(words) for words in [_ADJECTIVES] * (1 + many) + [_NOUNS]),
        "uuids": lambda: str(UUID(int=random.getrandbits(128), version=4)),
    }
    drawn: dict[str, None] = {}  # a set that keeps its order
    while len(drawn) < number:
        drawn[make[kind]()] = None
    return list(drawn)


def every_word() -> tuple[list[str], list[str]]:
    """What keys of words are made of: their first parts, and their last."""
    return _ADJECTIVES, _NOUNS

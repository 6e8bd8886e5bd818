"""Solved needles to train on, and a tokenizer of their words: what the run `needle_tiny` learns to retrieve from.

A model of a few layers learns to copy from its context after a few hundred steps, if it sees what there is to copy
often and near at first. So most documents are short, some as long as the context, and some are lists that are said
twice.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from megatron_attn2d.data.build import Built, build
from megatron_attn2d.data.indexed import is_complete
from megatron_attn2d.data.readers import library
from megatron_attn2d.data.tokenizers import TokenizerChoice
from megatron_attn2d.errors import UsageError
from megatron_attn2d.inference.tasks.filler import NOISE, distinct, every_word
from megatron_attn2d.inference.tasks.needle import Needles

PIECE = r" ?\w+|[^\w]"
"""A token: a word with the space before it, or another character."""
END, UNKNOWN = "<end>", "<unknown>"
_SHORTEST = 56
"""Tokens of the shortest document, a needle and a question about it."""
_LONGEST_SENTENCE = max(len(re.findall(PIECE, f" {sentence}")) for sentence in NOISE.sentences)
_NEEDLES = 4
"""At most in a document; each has a question."""
_LISTS = 0.15
"""Share of the documents."""


@dataclass(frozen=True)
class Needlework:
    """Which documents to make."""

    tokens: int
    """Of all documents together, about."""
    longest: int
    """Tokens of a document at most."""
    digits: int
    """Of the hidden numbers."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.longest < _SHORTEST:
            raise UsageError(
                f"--context {self.longest}: a needle and its question take {_SHORTEST} tokens; choose more"
            )
        if not 2 <= self.digits <= 4:  # a list has more numbers than there are of one digit
            raise UsageError(f"--digits {self.digits}: every number is a word of the vocabulary; choose 2 to 4")
        if self.tokens < 1:
            raise UsageError(f"--tokens {self.tokens}: choose 1 or more")


def write(work: Needlework, prefix: Path) -> Built:
    """Writes the data set `prefix`, and its tokenizer into the folder `prefix`-tokenizer.

    Raises:
        UsageError: they are there already, or the library of the tokenizer is not installed.
    """
    if is_complete(prefix):
        raise UsageError(f"{prefix}: a data set of that name is there; remove it, or choose another prefix")
    folder = tokenizer_folder(prefix)
    save_tokenizer(vocabulary(work.digits), folder)
    with tempfile.TemporaryDirectory() as scratch:
        texts = Path(scratch, f"{prefix.name}.jsonl")
        with texts.open("w") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in documents(work))
        return build([texts], prefix, TokenizerChoice("huggingface", str(folder)))


def tokenizer_folder(prefix: Path) -> Path:
    """Where the tokenizer of the data set `prefix` is."""
    return prefix.with_name(f"{prefix.name}-tokenizer")


def documents(work: Needlework) -> Iterator[str]:
    """The documents; the same for equal `work`."""
    random = Random(work.seed)
    tokens = 0
    while tokens < work.tokens:
        listed = random.random() < _LISTS
        text = _list_said_twice(work, random) if listed else _needles(work, random)
        tokens += _count(text) + 1
        yield text


def _needles(work: Needlework, random: Random) -> str:
    """A haystack whose questions are answered."""
    # Density length ** -2.5: from each length to its double 1.4 times as many tokens as from there to the next.
    shortest, longest = _SHORTEST**-1.5, work.longest**-1.5
    room = (shortest - random.random() * (shortest - longest)) ** (-1 / 1.5)
    keys = random.randint(1, min(_NEEDLES, int(room) // _SHORTEST))
    task = Needles("needle", NOISE, keys=keys, digits=work.digits)
    least = _count(task.haystack(0, Random(0)).solved())
    return task.haystack(max(0, int(room) - least) // _LONGEST_SENTENCE, random).solved()


def _list_said_twice(work: Needlework, random: Random) -> str:
    """Keys with their values, and again, in the same order or another."""
    number = random.randint(2, max(2, min(16, work.longest // 16)))
    keys, values = distinct("words", number, random), distinct("numbers", number, random, work.digits)
    items = [f" {key} {value}," for key, value in zip(keys, values, strict=True)]
    again = random.sample(items, number) if random.random() < 0.5 else items
    return f"List:{''.join(items)}\nAgain:{''.join(again)}\n"


def _count(text: str) -> int:
    return len(re.findall(PIECE, text))


def vocabulary(digits: int) -> list[str]:
    """Every token that documents with numbers of `digits` digits hold, the end of a document first."""
    work = Needlework(tokens=1, longest=2000, digits=digits)
    said = [_list_said_twice(work, Random(0)), *(f"\n{sentence} {sentence}" for sentence in NOISE.sentences)]
    said += [Needles("needle", NOISE, keys=keys, digits=digits).haystack(0, Random(0)).solved() for keys in (1, 2)]
    first, others = every_word()
    words = [*(f" {word}" for word in first), *others, *(f" {n}" for n in range(10 ** (digits - 1), 10**digits))]
    return list(dict.fromkeys([END, UNKNOWN, *re.findall(PIECE, "".join(said)), *words]))


def save_tokenizer(tokens: Sequence[str], folder: Path) -> None:
    """Writes a Hugging Face tokenizer that knows `tokens`, words in their entirety.

    Raises:
        UsageError: its library is not installed.
    """
    library("tokenizers", "a tokenizer of words")
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PIECE), "isolated")
    tokenizer.decoder = decoders.Fuse()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "unk_token": UNKNOWN}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings) + "\n")

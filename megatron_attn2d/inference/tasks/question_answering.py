"""Questions about given documents, hidden among others of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from megatron_attn2d.errors import UsageError
from megatron_attn2d.inference.tasks.haystack import Haystack, Question


@dataclass(frozen=True)
class Known:
    """A question and the documents that answer it."""

    question: str
    answers: tuple[str, ...]
    """Each on its own is right."""
    documents: tuple[str, ...]


@dataclass(frozen=True)
class DocumentQuestions:
    """Documents in a random order, among them those that answer `asked` of the `known` questions.

    The size is the number of the other documents.
    """

    known: Sequence[Known]
    name: str = "qa"
    asked: int = 4

    @property
    def _all(self) -> dict[str, None]:
        """Every document once."""
        return {document: None for known in self.known for document in known.documents}

    @property
    def most(self) -> int:
        """Documents there are, less those that a haystack has at any size, at the most."""
        longest = sorted((len(known.documents) for known in self.known), reverse=True)
        return max(0, len(self._all) - sum(longest[: self.asked]))

    def haystack(self, size: int, random: Random) -> Haystack:
        """A haystack with `size` documents that answer none of its questions."""
        chosen = random.sample(self.known, min(self.asked, len(self.known)))
        needed = {document: None for known in chosen for document in known.documents}
        others = [document for document in self._all if document not in needed]
        documents = [*needed, *random.sample(others, size)]
        random.shuffle(documents)
        listed = "\n\n".join(f"Document {number}: {document}" for number, document in enumerate(documents, 1))
        questions = tuple(self._question(known, documents) for known in chosen)
        return Haystack(f"Answer questions from these documents, in a few words.\n\n{listed}\n", questions)

    def _question(self, known: Known, documents: Sequence[str]) -> Question:
        lengths = [len(document) for document in documents]
        before = sum(lengths[: documents.index(known.documents[0])]) / sum(lengths)
        asked = f"\nQuestion: {known.question}\nAnswer:"
        return Question(asked, known.answers, "any", before if len(known.documents) == 1 else None)


def from_file(path: Path) -> list[Known]:
    """The questions of a JSONL file: `{"question": "...", "answers": ["..."], "documents": ["..."]}` per line.

    Raises:
        UsageError: there is no such file or no line in it, or a line is not of that form; names the line.
    """
    if not path.is_file():
        raise UsageError(f"--questions {path}: no such file")
    known = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            read = json.loads(line)
        except ValueError as error:
            raise UsageError(f"--questions {path}, line {number}: broken JSON ({error})") from None
        if not isinstance(read, dict) or not (
            isinstance(read.get("question"), str) and _texts(read.get("answers")) and _texts(read.get("documents"))
        ):
            raise UsageError(
                f"--questions {path}, line {number}: not a question with its answers and the documents that hold them; "
                'write {"question": "...", "answers": ["..."], "documents": ["..."]}'
            )
        known.append(Known(read["question"], tuple(read["answers"]), tuple(read["documents"])))
    if not known:
        raise UsageError(f"--questions {path}: empty; give one question per line")
    return known


def _texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) and text for text in value)

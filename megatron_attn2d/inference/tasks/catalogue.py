"""The tasks by name: a needle by depth, RULER's thirteen kinds, and which of them a command line asks for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_attn2d.errors import UsageError, nearest
from megatron_attn2d.inference.tasks import question_answering
from megatron_attn2d.inference.tasks.counting import CommonWords, FrequentWords
from megatron_attn2d.inference.tasks.filler import NOISE, Text
from megatron_attn2d.inference.tasks.haystack import Task
from megatron_attn2d.inference.tasks.needle import Needles
from megatron_attn2d.inference.tasks.tracking import VariableTracking

RULER = (
    "niah_single_1",
    "niah_single_2",
    "niah_single_3",
    "niah_multikey_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "niah_multivalue",
    "niah_multiquery",
    "vt",
    "cwe",
    "fwe",
    "qa",
)
"""RULER's kinds (Hsieh et al., arXiv 2404.06654), by its names; its two sets of questions are one task here."""
IN_TEXT = frozenset({"niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multivalue", "niah_multiquery"})
"""Which of them hide their needles in a text of the user's."""
NAMES = ("needle", "perplexity", "ruler", *RULER)
"""What `--tasks` takes."""


def chosen(names: Sequence[str]) -> list[str]:
    """`names` without repetition, `ruler` replaced by its kinds.

    Raises:
        UsageError: a name is none of `NAMES`.
    """
    for name in names:
        if name not in NAMES:
            raise UsageError(f"--tasks {name}: no such task; {nearest(name, NAMES)}")
    return list(dict.fromkeys(task for name in names for task in (RULER if name == "ruler" else (name,))))


def needles_by_depth(depths: Sequence[float], text: Text | None, digits: int) -> list[Task]:
    """The task `needle` at every depth: one fact in noise, or in `text`."""
    return [Needles("needle", text or NOISE, depth=depth, digits=digits) for depth in depths]


def ruler(name: str, text: Text | None, questions: Path | None) -> Task:
    """One of `RULER`.

    Raises:
        UsageError: it is made of text or questions, and there are none.
    """
    if name == "qa":
        if questions is None:
            raise UsageError(
                "--tasks qa: asks about documents of yours; give --questions FILE.jsonl, or name other tasks"
            )
        return question_answering.DocumentQuestions(question_answering.from_file(questions))
    if name in IN_TEXT and text is None:
        raise UsageError(
            f"--tasks {name}: hides its needle in a text of yours; give --haystack FILE, or name other tasks"
        )
    text = text or NOISE
    tasks: dict[str, Task] = {
        "niah_single_1": Needles("niah_single_1", NOISE),
        "niah_single_2": Needles("niah_single_2", text),
        "niah_single_3": Needles("niah_single_3", text, value_kind="uuids"),
        "niah_multikey_1": Needles("niah_multikey_1", text, keys=4),
        "niah_multikey_2": Needles("niah_multikey_2", "needles"),
        "niah_multikey_3": Needles("niah_multikey_3", "needles", key_kind="uuids", value_kind="uuids"),
        "niah_multivalue": Needles("niah_multivalue", text, values=4),
        "niah_multiquery": Needles("niah_multiquery", text, keys=4, asked_together=4),
        "vt": VariableTracking(),
        "cwe": CommonWords(),
        "fwe": FrequentWords(),
    }
    return tasks[name]

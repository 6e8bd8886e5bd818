"""What Megatron refuses before the first step has ended, told in one sentence that names the arguments.

Megatron checks its arguments in hundreds of places: while it reads them, while it builds the model, and in the first
step. All of them raise, and few name what the user wrote. Here the message, the statement that raised it and the
condition above that are searched for the names of the arguments that were given. The traceback is in the log.
"""

from __future__ import annotations

import ast
import functools
import linecache
import re
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_attn2d.config import upstream_flags
from megatron_attn2d.config.arguments import key_of
from megatron_attn2d.errors import UsageError, show
from megatron_attn2d.megatron.upstream.patching import Patch, applied

_SLIPS = (TypeError, KeyError, IndexError, AttributeError, ZeroDivisionError)
"""What Megatron's code trips over where it doesn't check."""
_MISFIT = re.compile(r"shape|size|dimension|out of range")
"""In what torch says where tensors don't fit: what fails otherwise is no matter of arguments."""
_UPSTREAM = re.compile(r"/megatron/(core|training)/")
_OURS = re.compile(r"/megatron_attn2d/(?!megatron/upstream/cpu\.py$)")  # through which every call of torch's goes
_FINDS_FAULTS = {"rerun_state_machine.py"}
"""Files of Megatron's that raise for what went wrong in a step."""
_OTHER_NAMES = {
    "lr_warmup_steps": "lr_warmup_iters",
    "lr_decay_steps": "lr_decay_iters",
    "num_moe_experts": "num_experts",
    "expert_parallel": "expert_model_parallel_size",
    "tensor_parallel": "tensor_model_parallel_size",
    "pipeline_parallel": "pipeline_model_parallel_size",
    "num_microbatches": "global_batch_size",
    "virtual_pipeline_model_parallel_size": "num_virtual_stages_per_pipeline_rank",
}
"""Names in Megatron's code of arguments that are stored under another one."""


@contextmanager
def told(arguments: Sequence[str]) -> Iterator[None]:
    """Until the first step has ended, makes what refuses Megatron's arguments a user's mistake."""
    ended = False

    def watch(train_step: Any) -> Any:
        @functools.wraps(train_step)
        def watched(*args: Any, **kwargs: Any) -> Any:
            nonlocal ended
            result = train_step(*args, **kwargs)
            ended = True
            return result

        return watched

    with applied([Patch("megatron.training.training:train_step", watch, "it says when the first step has ended")]):
        try:
            yield
        except UsageError:
            raise
        except Exception as error:
            if ended or not _is_refusal(error):
                raise
            traceback.print_exc()
            raise UsageError(sentence(error, arguments)) from error


def sentence(error: BaseException, arguments: Sequence[str]) -> str:
    """What `error` says, and those of `arguments` that it is about."""
    at = _raised_in(error)
    statement, condition = _source(at)
    said, where = " ".join(str(error).split()), f"({Path(at.filename).name}, line {at.lineno})"
    if not isinstance(statement, ast.Raise | ast.Assert) and not isinstance(error, ValueError):
        said = f"Megatron fails in {ast.unparse(statement) if statement else at.line} {where}: {said}"
    elif not said:
        said = f"{ast.unparse(statement) if statement else at.line} {where}"
    if not _UPSTREAM.search(at.filename):  # ours, which name what they are about
        return said
    named = _named(f"{said} {condition}", arguments)
    return f"Megatron's arguments: {said}" + (f"; given: {', '.join(named)}" if named else "")


def _is_refusal(error: Exception) -> bool:
    """Whether Megatron, or this package, won't do or can't do what it was asked for; not that something broke."""
    if isinstance(error, ValueError):
        return True
    at = _raised_in(error)
    upstreams = _UPSTREAM.search(at.filename) is not None
    if not upstreams or Path(at.filename).name in _FINDS_FAULTS or isinstance(error, OSError):
        return False
    raised_there = at == traceback.extract_tb(error.__traceback__)[-1]
    misfit = type(error) is RuntimeError and _MISFIT.search(str(error)) is not None
    return raised_there or misfit or isinstance(error, _SLIPS)


def _raised_in(error: BaseException) -> traceback.FrameSummary:
    """The innermost frame of Megatron's or this package's; the last one, if there is none."""
    frames = traceback.extract_tb(error.__traceback__)
    near = [frame for frame in frames if _UPSTREAM.search(frame.filename) or _OURS.search(frame.filename)]
    return (near or frames)[-1]


def _source(at: traceback.FrameSummary) -> tuple[ast.stmt | None, str]:
    """The statement of a frame, and its source with the nearest condition above it."""
    statements = _around(at.filename, at.lineno or 0)
    tests = [node.test for node in statements if isinstance(node, ast.If)][:1]
    return next(iter(statements), None), " ".join(ast.unparse(node) for node in (*statements[:1], *tests))


@functools.cache
def _tree(filename: str) -> ast.Module | None:
    try:
        return ast.parse("".join(linecache.getlines(filename)))
    except SyntaxError:
        return None


def _around(filename: str, line: int) -> list[ast.stmt]:
    """The statements that hold a line of a file, the innermost first."""
    tree = _tree(filename)
    found = [
        node
        for node in (ast.walk(tree) if tree else ())
        if isinstance(node, ast.stmt) and node.lineno <= line <= (node.end_lineno or node.lineno)
    ]
    return sorted(found, key=lambda node: (node.end_lineno or node.lineno) - node.lineno)


def _named(text: str, arguments: Sequence[str]) -> list[str]:
    """'model.num_layers = 4': the arguments that `text` is about, in the order in which it names them."""
    words = [_OTHER_NAMES.get(word, word) for word in re.findall(r"[a-z]\w+", text.lower().replace("-", "_"))]
    return list(dict.fromkeys(f"{key} = {value}" for word in words for key, value in _by_name(arguments).get(word, ())))


def _by_name(arguments: Sequence[str]) -> dict[str, list[tuple[str, str]]]:
    """Keys and values of the arguments given, by the names that Megatron's code may have for them."""
    found: dict[str, list[tuple[str, str]]] = {}
    for dest, (flag, values) in upstream_flags.given(arguments).items():
        value = show(values[0] if len(values) == 1 else values or True)
        for name in {dest, flag.removeprefix("--").replace("-", "_")}:
            found.setdefault(name, []).append((key_of(flag), value.strip("'")))
    return found

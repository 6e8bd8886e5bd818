"""Turns an error by which Megatron refuses its arguments into one sentence that names the arguments.

Megatron checks its arguments in hundreds of places: while it reads them, while it builds the model, and in the first
step. All of them raise, and few name the argument. Here the message, the statement that raised it and the condition
above that statement are searched for the names of the arguments that were given. The traceback is in the log.
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
from megatron_attn2d.config.passed_through import key_of
from megatron_attn2d.errors import UsageError, show
from megatron_attn2d.megatron.upstream.patching import Patch, applied

_SLIPS = (TypeError, KeyError, IndexError, AttributeError, ZeroDivisionError)
"""Errors that Megatron's code runs into where it doesn't check an argument."""
_MISFIT = re.compile(r"shape|size|dimension|out of range")
"""Words of torch's errors about tensors that don't fit; its other errors are not about arguments."""
_UPSTREAM = re.compile(r"/megatron/(core|training)/")
_OURS = re.compile(r"/megatron_attn2d/(?!megatron/upstream/cpu\.py$)")  # cpu.py wraps every call of torch
_FINDS_FAULTS = {"rerun_state_machine.py"}
"""Files of Megatron that raise errors about a step's results, not about arguments."""
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
"""Names in Megatron's code for arguments that are stored under another name."""


@contextmanager
def told(arguments: Sequence[str]) -> Iterator[None]:
    """While entered, and until the first step has ended, turn errors that refuse arguments into UsageError.

    Args:
        arguments: Megatron's command line.

    Raises:
        UsageError: Megatron, or this package, has refused an argument; the message is `sentence`.
    """
    ended = False

    def watch(train_step: Any) -> Any:
        @functools.wraps(train_step)
        def watched(*args: Any, **kwargs: Any) -> Any:
            nonlocal ended
            result = train_step(*args, **kwargs)
            ended = True
            return result

        return watched

    with applied([Patch("megatron.training.training:train_step", watch, "the end of the first step is noticed")]):
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
    """The message of `error` in one sentence, with those of `arguments` that it concerns, and their values."""
    at = _raised_in(error)
    statement, condition = _source(at)
    said, where = " ".join(str(error).split()), f"({Path(at.filename).name}, line {at.lineno})"
    if not isinstance(statement, ast.Raise | ast.Assert) and not isinstance(error, ValueError):
        said = f"Megatron fails in {ast.unparse(statement) if statement else at.line} {where}: {said}"
    elif not said:
        said = f"{ast.unparse(statement) if statement else at.line} {where}"
    if not _UPSTREAM.search(at.filename):  # errors of this package name the argument themselves
        return said
    named = _named(f"{said} {condition}", arguments)
    return f"Megatron's arguments: {said}" + (f"; given: {', '.join(named)}" if named else "")


def _is_refusal(error: Exception) -> bool:
    """Whether `error` refuses what the arguments ask for, and does not report that something broke."""
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
    """The innermost frame in Megatron's code or this package's; the last frame if there is none."""
    frames = traceback.extract_tb(error.__traceback__)
    near = [frame for frame in frames if _UPSTREAM.search(frame.filename) or _OURS.search(frame.filename)]
    return (near or frames)[-1]


def _source(at: traceback.FrameSummary) -> tuple[ast.stmt | None, str]:
    """The statement at which a frame stands, and the source of that and of the nearest condition around it."""
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
    """The statements that contain a line of a file, the innermost first."""
    tree = _tree(filename)
    found = [
        node
        for node in (ast.walk(tree) if tree else ())
        if isinstance(node, ast.stmt) and node.lineno <= line <= (node.end_lineno or node.lineno)
    ]
    return sorted(found, key=lambda node: (node.end_lineno or node.lineno) - node.lineno)


def _named(text: str, arguments: Sequence[str]) -> list[str]:
    """The arguments that `text` names, in its order, as 'model.num_layers = 4'."""
    words = [_OTHER_NAMES.get(word, word) for word in re.findall(r"[a-z]\w+", text.lower().replace("-", "_"))]
    return list(dict.fromkeys(f"{key} = {value}" for word in words for key, value in _by_name(arguments).get(word, ())))


def _by_name(arguments: Sequence[str]) -> dict[str, list[tuple[str, str]]]:
    """Keys and values of the given arguments, by each name that Megatron's code may use for them."""
    found: dict[str, list[tuple[str, str]]] = {}
    for dest, (flag, values) in upstream_flags.given(arguments).items():
        value = show(values[0] if len(values) == 1 else values or True)
        for name in {dest, flag.removeprefix("--").replace("-", "_")}:
            found.setdefault(name, []).append((key_of(flag), value.strip("'")))
    return found

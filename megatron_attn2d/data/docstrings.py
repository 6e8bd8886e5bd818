"""Builds the embedded fine-tuning examples: docstrings of the standard library, and the functions they describe."""

from __future__ import annotations

import ast
import fcntl
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

from megatron_attn2d.data.build import build
from megatron_attn2d.data.indexed import is_complete, standard_library_sources
from megatron_attn2d.data.tokenizers import TokenizerChoice

NAME = "python-docstrings"
LONGEST = 512
"""Most tokens, that is bytes, of an example."""


def build_default(directory: Path | str) -> Path:
    """Build the embedded examples in `directory`, unless they are there.

    Returns:
        Their prefix, as Megatron's `--data-path` takes it.
    """
    prefix = Path(directory) / NAME
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with (prefix.parent / f".{NAME}.lock").open("w") as lock, tempfile.TemporaryDirectory() as folder:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several ranks of a host may come here at once
        if not is_complete(prefix):
            lines = Path(folder, f"{NAME}.jsonl")
            lines.write_text("".join(json.dumps(example) + "\n" for example in examples()))
            build([lines], prefix, TokenizerChoice(), format="sft", longest=LONGEST, overwrite=True)
    return prefix


def examples() -> Iterator[dict[str, str]]:
    """Yields an example per function of the standard library that has a docstring.

    The docstring is the prompt, and the function without it the completion.
    """
    for file in standard_library_sources():
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError):  # templates, and files in other encodings
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef) or not (says := ast.get_docstring(node)):
                continue
            node.body = node.body[1:] or [ast.Pass()]
            yield {"prompt": f'"""{says}"""\n', "completion": ast.unparse(node) + "\n"}

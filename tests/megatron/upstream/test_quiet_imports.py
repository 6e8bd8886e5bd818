"""What importing Megatron says about missing libraries is silenced in one place, for imports alone."""

import logging
import re
import sys
import warnings
from pathlib import Path

import pytest

from megatron_attn2d.megatron.upstream.quiet_imports import quiet_import

PACKAGE = Path(__file__).parents[3] / "megatron_attn2d"
MODULE = "import logging, warnings; warnings.warn('told'); logging.getLogger('x').warning('told'); VALUE = 3"


def test_an_import_is_quiet_and_what_follows_is_not(tmp_path, monkeypatch, capfd):
    (tmp_path / "greeting_module.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert quiet_import("greeting_module").VALUE == 3
    finally:
        sys.modules.pop("greeting_module", None)
    assert capfd.readouterr() == ("", "")
    assert logging.root.manager.disable == logging.NOTSET
    with pytest.warns(UserWarning, match="heard"):
        warnings.warn("heard", stacklevel=1)


def test_nobody_else_silences_or_imports_megatron_aloud():
    """Outside of ranks, whose output goes to their logs."""
    silences = re.compile(r"catch_warnings|simplefilter|logging\.disable")
    aloud = re.compile(r"^\s*(?:from|import) megatron\.", re.M)
    files = {path.relative_to(PACKAGE).as_posix(): path.read_text() for path in PACKAGE.rglob("*.py")}
    assert {name for name, text in files.items() if silences.search(text)} == {"megatron/upstream/quiet_imports.py"}
    greeted = {name for name, text in files.items() if aloud.search(text) and "with hushed():" not in text}
    in_ranks = (
        "megatron/",
        "training/",
        "inference/",
        "data/documents.py",
    )  # the last: subclasses
    assert {name for name in greeted if not name.startswith(in_ranks)} == set()

"""Documents to learn retrieval from: their lengths, their answers, and a tokenizer that knows their words."""

import re
from itertools import islice
from pathlib import Path

import pytest

from megatron_attn2d import cli
from megatron_attn2d.data import tokenizers
from megatron_attn2d.inference.tasks import training
from megatron_attn2d.inference.tasks.filler import NOISE
from megatron_attn2d.inference.tasks.needle import Needles


def test_documents_fit_and_are_answered():
    work = training.Needlework(tokens=60_000, longest=400, digits=2)
    made = list(training.documents(work))
    lengths = [len(re.findall(training.PIECE, text)) for text in made]
    assert sum(lengths) == pytest.approx(60_000, rel=0.02)
    assert max(lengths) <= 400
    assert sum(length < 100 for length in lengths) > len(made) / 2
    assert sum(length > 200 for length in lengths) > len(made) / 50
    assert sum(text.startswith("List:") for text in made) == pytest.approx(0.15 * len(made), rel=0.4)
    for text in made:
        for number, key in re.findall(r"Answer: The secret number of (\S+) is (\d\d)\.\n", text):
            assert f"The secret number of {number} is {key}." in text.partition("\nQuestion")[0]
    assert made[:20] == list(islice(training.documents(work), 20))


def test_the_tokenizer_knows_what_is_trained_on_and_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    command = ["data", "needles", "-o", str(tmp_path / "needles"), "--tokens", "5000", "--context", "256"]
    assert cli.main(command) == 0
    assert "402 words in the tokenizer" in capsys.readouterr().out
    tokenizer = tokenizers.load(tokenizers.TokenizerChoice("huggingface", str(tmp_path / "needles-tokenizer")))
    work = training.Needlework(tokens=5000, longest=256, digits=2, seed=1)
    asked = [Needles("needle", NOISE, digits=2).haystack(size, training.Random(size)).solved() for size in range(6)]
    for text in [*training.documents(work), *asked]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids[:-1]) == text
        assert (ids[-1], 1 in ids) == (tokenizer.eod, False)
    assert cli.main(command) == 2
    assert "a data set of that name is there" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "message"),
    [(["--context", "20"], "take 56 tokens"), (["--digits", "1"], "choose 2 to 4"), (["--tokens", "0"], "1 or more")],
)
def test_mistakes_are_named(option: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["data", "needles", "-o", str(tmp_path / "a"), *option]) == 2
    assert message in capsys.readouterr().err

"""Tokenizers: text to ids and back, as the run that reads the data set will."""

import json
import sys
from argparse import ArgumentParser
from pathlib import Path

import pytest

from megatron_attn2d.config import load_run, megatron_arguments
from megatron_attn2d.config.schema import Data
from megatron_attn2d.config.yaml_io import dump
from megatron_attn2d.data import tokenizers
from megatron_attn2d.data.tokenizers import TokenizerChoice, load, yaml_section
from megatron_attn2d.errors import UsageError
from megatron_attn2d.preview.parameters import parameters
from tests.data.conftest import TEXTS

RUNS = Path(__file__).parents[2] / "configs" / "runs"


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back_and_a_document_ends_once(choice: TokenizerChoice, text: str) -> None:
    tokenizer = load(choice)
    ids = tokenizer.encode(text)
    assert ids[-1] == tokenizer.eod
    assert (ids == tokenizer.eod).sum() == 1
    assert 0 <= ids.min() <= ids.max() < tokenizer.vocab_size
    assert tokenizer.decode(ids[:-1]) == text
    assert choice.kind == "bytes" or len(ids) <= len(text.encode()) + 2


def test_a_run_with_the_printed_section_reads_the_same_ids(choice: TokenizerChoice, tmp_path: Path) -> None:
    """The tokenizer that Megatron builds from the run's arguments is the judge."""
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.training.arguments import add_megatron_arguments

    yaml = {"extends": str(RUNS / "quickstart.yaml"), "data": {"paths": ["set"], **yaml_section(choice)}}
    (tmp_path / "run.yaml").write_text(dump(yaml))
    arguments = megatron_arguments(load_run(tmp_path / "run.yaml"))
    args = add_megatron_arguments(ArgumentParser(allow_abbrev=False)).parse_known_args(arguments)[0]
    args.rank = 0
    args.pad_vocab_size = True
    theirs, ours = build_tokenizer(args), load(choice)
    assert theirs.eod == ours.eod
    assert args.padded_vocab_size >= ours.vocab_size
    if choice.kind != "bytes":  # Megatron has no tokenizer for bytes: such a set holds ids
        assert [*theirs.tokenize(TEXTS[2]), theirs.eod] == ours.encode(TEXTS[2]).tolist()


def test_an_eod_that_the_tokenizer_adds_itself_is_not_doubled(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<e>": 2}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <e>", special_tokens=[("<e>", 2)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<e>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load(TokenizerChoice("huggingface", str(tmp_path))).encode("a b a").tolist() == [0, 1, 0, 2]


@pytest.mark.parametrize(
    ("kind", "library"), [("huggingface", "transformers"), ("sentencepiece", "sentencepiece"), ("tiktoken", "tiktoken")]
)
def test_a_missing_library_is_named(kind, library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "model.json"
    model.write_text("[]")
    monkeypatch.setitem(sys.modules, library, None)
    message = rf"tokenizer {kind}: needs the library {library}, .* pip install 'megatron-attn2d\[data\]'"
    with pytest.raises(UsageError, match=message):
        load(TokenizerChoice(kind, str(model)))


@pytest.mark.parametrize(
    ("choice", "content", "message"),
    [
        (TokenizerChoice("huggingface"), None, "huggingface: is read from local files; name its file or folder"),
        (TokenizerChoice("bytes", "x"), None, "tokenizer model x: bytes need none"),
        (TokenizerChoice("sentencepiece", "m.model"), None, "m.model: no such file or folder"),
        (
            TokenizerChoice("tiktoken", "m.model"),
            "YQ== 0",
            "m.model: Megatron reads tiktoken's vocabulary from a .json",
        ),
        (TokenizerChoice("tiktoken", "m.json"), "{", "m.json: can't be read as tiktoken"),
        (TokenizerChoice("sentencepiece", "m.model"), "junk", "m.model: can't be read as sentencepiece"),
        (TokenizerChoice("huggingface", "m.json"), "{", "m.json: can't be read as huggingface"),
    ],
)
def test_what_is_no_tokenizer_is_refused(choice, content, message, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(choice.model).write_text(content)
    with pytest.raises(UsageError, match=message):
        load(choice)


def test_a_tokenizer_that_cannot_end_a_document_is_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(UsageError, match="no token that ends a text"):
        load(TokenizerChoice("huggingface", str(tmp_path)))


def test_a_runs_tokenizer_knows_its_vocabulary_whatever_the_model_says(choice: TokenizerChoice) -> None:
    """A run that extends a shipped model has the vocab_size of that model's own data."""
    section = {"vocab_size": 50257} | tokenizers.yaml_section(choice)
    data = Data(**section)
    assert tokenizers.from_yaml_section(data) == choice
    size = 512 if choice.kind == "bytes" else load(choice).vocab_size
    assert tokenizers.vocabulary(data) == size
    run = load_run(
        RUNS / "quickstart.yaml", ["data.paths=[set]", *(f"data.{key}={json.dumps(v)}" for key, v in section.items())]
    )
    assert parameters(run).embedding == -(-size // 128) * 128 * 128


def test_the_command_line_offers_what_there_is() -> None:
    from typing import get_args

    from megatron_attn2d.commands.data import TOKENIZERS

    assert get_args(tokenizers.Kind) == TOKENIZERS

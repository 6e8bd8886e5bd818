"""`data build` and `data inspect` as they are typed, and what a run makes of the sets."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_attn2d import cli
from megatron_attn2d.config import load_run
from megatron_attn2d.config.yaml_io import parse
from megatron_attn2d.data import indexed, matching
from megatron_attn2d.data.matching import check_data, largest_id
from megatron_attn2d.data.tokenizers import TokenizerChoice, digest
from megatron_attn2d.errors import ConfigError
from megatron_attn2d.launch import ranks

QUICKSTART = str(Path(__file__).parents[2] / "configs" / "runs" / "quickstart.yaml")


def lines(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    return str(path)


def test_build_prints_what_a_run_needs_and_inspect_shows_it(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = lines(tmp_path / "a.jsonl", ["one", "", "three"])
    assert cli.main(["data", "build", file, "-o", "out/set", "--key", "body", "--processes", "2", "--skip-bad"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("out/set: 2 documents, 10 tokens\nleft out: 1 empty document\nIn a run's YAML:\n")
    section = parse(out.partition("YAML:\n")[2], "printed")
    assert section["data"]["paths"] == ["out/set"]
    assert load_run(QUICKSTART, [f"data.{key}={json.dumps(value)}" for key, value in section["data"].items()])
    assert cli.main(["data", "inspect", "out/set", "--document", "1", "--tokens", "3"]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == ["116 104 114", "thr"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["build", "a.jsonl", "-o", "set"], "a.jsonl, line 1: no key 'text'; it has 'body'"),
        (["build", "a.jsonl", "-o", "set", "--processes", "0"], "0 processes: choose 1 or more"),
        (["build", "a.jsonl", "-o", "set", "--tokenizer", "tiktoken"], "tiktoken: is read from local files"),
        (
            ["build", "a.jsonl", "-o", "set", "--vocab-size", "300"],
            "vocabulary of 300 ids: bytes has its own size; leave",
        ),
        (
            ["build", "a.jsonl", "-o", "s", "--tokenizer", "tiktoken", "--tokenizer-model", ".", "--vocab-size", "-1"],
            "vocabulary of -1 ids: 1000 of tiktoken's are special ones; choose more",
        ),
        (["build", "a.jsonl", "-o", "."], ".: a folder, whose files need a name to begin with; write ./NAME"),
        (
            ["build", "a.jsonl", "-o", "slash/"],
            "slash/: a folder, whose files need a name to begin with; write slash/N",
        ),
        (["inspect", "set"], "set: no data set: set.bin and set.idx make one"),
        (["inspect", "/"], "/: a folder, whose files need a name to begin with; write /NAME"),
        (["inspect", "set", "--tokens", "-5"], "-5 tokens to show: choose 1 or more"),
        (
            ["inspect", "set", "--tokenizer-model", "x"],
            "--tokenizer-model and --vocab-size describe a --token",
        ),
    ],
)
def test_mistakes_are_one_message(words: list[str], message: str, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines(tmp_path / "a.jsonl", ["one"])
    assert cli.main(["data", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_run_without_its_data_is_refused_before_it_starts(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ranks, "run_local", lambda *args, **kwargs: pytest.fail("started"))
    (tmp_path / "half.bin").touch()
    with pytest.raises(ConfigError, match=r"data.paths = 'half': half.bin and half.idx are not both there; build it"):
        cli.main(["train", QUICKSTART, "data.paths={half: 0.5, other: 0.5}", "--debug"])
    assert not (tmp_path / "runs").exists()


HF, HF_RUN = {"kind": "huggingface", "model": "hf"}, {"tokenizer_type": "HuggingFaceTokenizer"}
WRITTEN_AND_READ = [
    # how a set was written, what the run says of it, what is refused
    ({"kind": "bytes"}, {}, ""),
    ({"kind": "bytes"}, {"vocab_size": 300}, ""),
    ({"kind": "bytes"}, {"null_tokenizer_eod_id": None}, ""),
    (
        {"kind": "bytes"},
        {"vocab_size": 256, "null_tokenizer_eod_id": None},
        "data.vocab_size = 256: set.json says that set holds token ids up to 256 of tokenizer bytes; choose "
        "data.tokenizer_type=NullTokenizer data.vocab_size=512 data.null_tokenizer_eod_id=256, or build the set again",
    ),
    ({"kind": "bytes"}, {"null_tokenizer_eod_id": 0}, "data.null_tokenizer_eod_id = 0: set.json says that set holds "),
    (
        {"kind": "bytes"},
        {"null_tokenizer_eod_id": None, "megatron_args": {"eod_mask_loss": True}},
        "data.null_tokenizer_eod_id = null: set.json says that set holds documents that end with 256; choose 256",
    ),
    (
        {"kind": "bytes"},
        {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": "hf"},
        "data.tokenizer_type = 'HuggingFaceTokenizer': set.json says that set holds ids of tokenizer bytes; choose ",
    ),
    (HF, {"vocab_size": 300, "null_tokenizer_eod_id": 299}, ""),  # ids are ids
    (
        HF,
        {"vocab_size": 200, "null_tokenizer_eod_id": None},
        "data.vocab_size = 200: set.json says that set holds token ids up to 299 of tokenizer huggingface from hf; ",
    ),
    (HF, HF_RUN | {"tokenizer_model": "hf"}, ""),
    (HF, HF_RUN | {"tokenizer_model": "copy"}, ""),
    (HF, HF_RUN | {"tokenizer_model": "elsewhere"}, ""),  # told by check_files
    (HF, HF_RUN | {"tokenizer_model": "other"}, "data.tokenizer_model = 'other': set.json says that set holds ids of "),
    (
        {"kind": "tiktoken", "model": "hf"},
        {"tokenizer_type": "TikTokenizer", "tokenizer_model": "hf", "vocab_size": 131072},
        "",
    ),
    (
        {"kind": "tiktoken", "model": "hf", "vocab_size": 1300},
        {"tokenizer_type": "TikTokenizer", "tokenizer_model": "hf", "vocab_size": 1200},
        "data.vocab_size = 1200: set.json says that set holds ids of a vocabulary of 1300; choose ",
    ),
]


@pytest.mark.parametrize(("written", "read", "message"), WRITTEN_AND_READ)
def test_a_set_is_read_with_the_tokenizer_that_wrote_it(
    written: dict[str, Any], read: dict[str, Any], message: str, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder, content in (("hf", "{}"), ("copy", "{}"), ("other", "[]")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "tokenizer.json").write_text(content)
    ids = {} if written["kind"] == "bytes" else {"largest_id": 299, "end_of_document": 299}
    kept = {"tokenizer_sha256": digest(TokenizerChoice(**written))} if ids else {}
    (tmp_path / "set.json").write_text(json.dumps({"tokenizer": written} | ids | kept))
    (tmp_path / "set.idx.sha256").touch()
    keys = {key if key == "megatron_args" else f"data.{key}": json.dumps(value) for key, value in read.items()}
    run = load_run(QUICKSTART, ["data.paths=[set]", *(f"{key}={value}" for key, value in keys.items())])
    with pytest.raises(ConfigError) if message else nullcontext() as caught:
        check_data(run)
    if message:
        assert str(caught.value).startswith(message)


def test_what_others_keep_beside_a_set_is_no_description(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set.json").write_text('{"text": "the texts themselves"}\n' * 3)
    check_data(load_run(QUICKSTART, ["data.paths=[set]"]))


def test_examples_are_no_text_to_train_on(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set.loss").touch()
    run = load_run(QUICKSTART, ["data.paths=[set]"])
    with pytest.raises(ConfigError, match=r"data\.format = 'text': set holds examples for fine-tuning.*choose sft"):
        check_data(run)
    check_data(run, trains=False)  # generation reads the tokenizer alone


def test_of_a_set_that_others_built_the_largest_id_is_found(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "a.txt").write_text("a" * 1000)
    text = indexed.build([tmp_path / "a.txt"], tmp_path / "text")
    assert largest_id(text) == 256
    monkeypatch.setattr(matching, "_BLOCK", 64)
    assert largest_id(text) == 256
    monkeypatch.setattr(matching, "_BLOCKS", 2)
    assert largest_id(text) == ord("a"), "parts alone are read of a set this large"


def test_a_blend_mixes_by_weight(tmp_path: Path) -> None:
    """Megatron's own blend of what the YAML compiles to, over sets whose tokens tell them apart."""
    from argparse import ArgumentParser

    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.training.arguments import add_megatron_arguments
    from megatron.training.utils import get_blend_and_blend_per_split

    from megatron_attn2d.config import megatron_arguments

    prefixes = []
    for letter in "ab":
        file = lines(tmp_path / f"{letter}.jsonl", [letter * 999] * 40)
        prefixes.append(f"{tmp_path}/{letter}")
        assert cli.main(["data", "build", file, "-o", prefixes[-1], "--key", "body"]) == 0
    run = load_run(QUICKSTART, [f"data.paths={{{prefixes[0]}: 1, {prefixes[1]}: 3}}"])
    args = add_megatron_arguments(ArgumentParser(allow_abbrev=False)).parse_known_args(megatron_arguments(run))[0]
    args.rank, args.pad_vocab_size = 0, False
    blend, _ = get_blend_and_blend_per_split(args)
    assert blend == (prefixes, [1.0, 3.0])
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=50,
        blend=blend,
        split=args.split,
        tokenizer=build_tokenizer(args),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        path_to_cache=str(tmp_path / "cache"),
    )
    train = BlendedMegatronDatasetBuilder(GPTDataset, [400, 0, 0], lambda: True, config).build()[0]
    majority = [int(np.bincount(train[i]["tokens"].numpy()).argmax()) for i in range(400)]
    assert majority.count(ord("a")) == pytest.approx(100, abs=4)
    assert majority.count(ord("b")) == pytest.approx(300, abs=4)

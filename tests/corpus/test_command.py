"""`data build` and `data inspect` as they are typed, and what a run makes of the sets."""

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_attn2d import cli, launch
from megatron_attn2d.config import load_run
from megatron_attn2d.config.errors import ConfigError
from megatron_attn2d.config.yaml_io import parse

QUICKSTART = str(Path(__file__).parents[2] / "configs" / "runs" / "quickstart.yaml")


def lines(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    return str(path)


def test_build_prints_what_a_run_needs_and_inspect_shows_it(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = lines(tmp_path / "a.jsonl", ["one", "", "three"])
    assert cli.main(["data", "build", file, "-o", "out/set", "--key", "body", "--processes", "2", "--skip-bad"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("out/set: 2 documents, 1 left out, 10 tokens\nIn a run's YAML:\n")
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
        (["inspect", "set"], "set: no data set: set.bin and set.idx make one"),
    ],
)
def test_mistakes_are_one_message(words: list[str], message: str, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines(tmp_path / "a.jsonl", ["one"])
    assert cli.main(["data", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_run_without_its_data_is_refused_before_it_starts(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "run_local", lambda *args, **kwargs: pytest.fail("started"))
    (tmp_path / "half.bin").touch()
    with pytest.raises(ConfigError, match=r"data.paths = 'half': half.bin and half.idx are not both there; build it"):
        cli.main(["train", QUICKSTART, "data.paths={half: 0.5, other: 0.5}", "--debug"])
    assert not (tmp_path / "runs").exists()


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

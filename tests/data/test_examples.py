"""Examples of fine-tuning: which tokens count, what is refused, and how they are dealt into samples."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_attn2d.data import docstrings, examples
from megatron_attn2d.data.build import build
from megatron_attn2d.data.inspect import open_indexed
from megatron_attn2d.data.readers import BadDocument
from megatron_attn2d.data.tokenizers import TokenizerChoice, load
from megatron_attn2d.errors import UsageError

BYTES = TokenizerChoice()
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Bye"},
]
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def parted(record: dict[str, Any], choice: TokenizerChoice) -> tuple[str, list[str]]:
    """The text of an example, and the pieces of it that count."""
    tokenizer = load(choice)
    ids, counts = examples.encode(record, tokenizer)
    assert counts.dtype == np.uint8
    bounds = np.flatnonzero(np.diff(counts)) + 1
    pieces = zip(np.split(ids, bounds), np.split(counts, bounds), strict=True)
    return tokenizer.decode(ids), [tokenizer.decode(some) for some, count in pieces if count[0]]


@pytest.mark.parametrize(
    ("record", "text", "counted"),
    [
        ({"prompt": "2+2=", "completion": "4"}, "2+2=4<end of document>", ["4<end of document>"]),
        (
            {"messages": TALK},
            "system: Be brief.<end of document>user: 2+2?<end of document>assistant: 4<end of document>"
            "user: Sure?<end of document>assistant: Yes.<end of document>",
            ["4<end of document>", "Yes.<end of document>"],
        ),
        (
            {"messages": [{"role": "system", "content": ""}, {"role": "assistant", "content": "Hi"}]},
            "system: <end of document>assistant: Hi<end of document>",
            ["Hi<end of document>"],
        ),
    ],
)
def test_completions_and_answers_count(record: dict[str, Any], text: str, counted: list[str]) -> None:
    assert parted(record, BYTES) == (text, counted)


@pytest.fixture
def templated(tmp_path: Path) -> Any:
    """A tokenizer with a chat template."""
    from tests.data.conftest import _huggingface

    def of(template: str | None) -> TokenizerChoice:
        folder = tmp_path / str(hash(template))
        folder.mkdir()
        choice = _huggingface(folder)
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
        return choice

    return of


def test_a_chat_is_written_by_the_template_and_answers_with_their_end_count(templated: Any) -> None:
    choice = templated(TEMPLATE)
    ids, counts = examples.encode({"messages": TALK}, tokenizer := load(choice))
    # Ids alone: decoding leaves out special tokens.
    turns = ["<|system|>Be brief.<|end|><|user|>2+2?<|end|><|assistant|>", "4<|end|>"]
    turns += ["<|user|>Sure?<|end|><|assistant|>", "Yes.<|end|>"]
    expected = [tokenizer.plain(turn) for turn in turns]
    assert np.array_equal(ids, np.concatenate(expected))
    assert counts.tolist() == [i % 2 for i, turn in enumerate(expected) for _ in turn]


def test_what_a_tokenizer_puts_around_a_text_is_not_put_around_each_part(templated: Any) -> None:
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    choice = templated(TEMPLATE)
    file = f"{choice.model}/tokenizer.json"
    library = Tokenizer.from_file(file)
    begin, end = library.token_to_id("A"), library.token_to_id("<|end|>")
    library.post_processor = TemplateProcessing(single="A $A <|end|>", special_tokens=[("A", begin), ("<|end|>", end)])
    library.save(file)
    tokenizer = load(choice)
    ids, counts = examples.encode({"prompt": "b", "completion": "c"}, tokenizer)
    assert ids.tolist() == [begin, library.token_to_id("b"), library.token_to_id("c"), end]
    assert counts.tolist() == [0, 0, 1, 1]
    assert ids[:2].tolist() == tokenizer.encode("b")[:-1].tolist()  # as `generate` begins it
    assert begin not in examples.encode({"messages": TALK}, tokenizer)[0]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (None, "the tokenizer has no chat template (give a prompt and a completion)"),
        (
            "{{ messages | length }}",
            "the chat template writes it otherwise once it goes on (give an example per answer)",
        ),
        ("{{ raise_exception('no system') }}", "the chat template refuses it (no system)"),
    ],
)
def test_chats_that_the_tokenizer_cannot_write_are_refused(template: str | None, reason: str, templated: Any) -> None:
    with pytest.raises(BadDocument) as error:
        examples.encode({"messages": TALK}, load(templated(template)))
    assert str(error.value) == reason


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"text": "x"}, "neither messages nor a prompt and a completion (it has 'text')"),
        ({"prompt": "x"}, "neither messages nor a prompt and a completion (it has 'prompt')"),
        ({"prompt": "x", "completion": " "}, "empty completion"),
        ({"prompt": 1, "completion": "x"}, "'prompt' is no text but int"),
        ({"messages": "hello"}, "'messages' is no list of objects"),
        ({"messages": [{"role": "user"}]}, "no key 'content'; it has 'role'"),
        (
            {"messages": [{"role": "bot", "content": "x"}]},
            "message 1 has the role 'bot' (choose system, user, assistant, tool)",
        ),
        ({"messages": [{"role": "assistant", "content": ""}]}, "empty answer (message 1)"),
        ({"messages": [{"role": "user", "content": None}]}, "'content' is no text but null"),
        ({"messages": TALK[:2]}, "no message of the role 'assistant', which alone counts in the loss"),
    ],
)
def test_what_is_no_example_is_refused_by_line(record: dict[str, Any], reason: str, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"prompt": "x", "completion": "y"}, record])
    with pytest.raises(UsageError) as error:
        build([file], tmp_path / "set", BYTES, format="sft")
    assert str(error.value) == f"{file}, line 2: {reason}; correct it, or leave such documents out by --skip-bad"


def test_examples_are_lines_of_json(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("prompt")
    with pytest.raises(UsageError, match=r"a.txt: no line of JSON \(examples are .jsonl\)"):
        build([tmp_path / "a.txt"], tmp_path / "set", BYTES, format="sft")


def test_a_built_set_says_which_tokens_count_and_leaves_out_what_is_too_long(tmp_path: Path) -> None:
    records = [{"prompt": "a" * n, "completion": "b" * (n % 7 + 1)} for n in range(1, 40)]
    file = write(tmp_path / "a.jsonl", records)
    built = build([file], tmp_path / "set", BYTES, format="sft", longest=30, processes=2)
    kept = [r for r in records if len(r["prompt"]) + len(r["completion"]) < 30]
    counted = [len(record["completion"]) + 1 for record in kept]
    assert (built.documents, built.predicted, built.longest) == (len(kept), sum(counted), 30)
    assert built.skipped == {"longer than 30 tokens": len(records) - len(kept)}
    counts = np.fromfile(tmp_path / "set.loss", dtype=np.uint8)
    indexed = open_indexed(tmp_path / "set")  # named: its arrays are views of a mapping that ends with it
    ids = np.concatenate([indexed[i] for i in range(len(kept))])
    assert np.array_equal(counts, ids != ord("a"))
    build([file], tmp_path / "set", BYTES, key="prompt", overwrite=True)
    assert not (tmp_path / "set.loss").exists()


# --- dealing ---

SEQ = 32


def dataset(prefix: Path, samples: int | None, multiple: int = 4, seed: int = 1) -> Any:
    from megatron.core.datasets.utils import Split

    from megatron_attn2d.data.documents import DocumentDatasetConfig, ExampleDataset

    config = DocumentDatasetConfig(
        random_seed=seed,
        sequence_length=SEQ,
        split="1,0,0",
        blend=([str(prefix)], None),
        tokenizer=SimpleNamespace(vocab_size=None, unique_identifiers={}),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        document_multiple=multiple,
    )
    low = ExampleDataset.build_low_level_dataset(str(prefix), config)
    indices = np.arange(ExampleDataset.numel_low_level_dataset(low), dtype=np.int32)
    return ExampleDataset(low, str(prefix), indices, samples, Split.train, config)


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    records = [{"prompt": chr(65 + n) * (n % 9 + 1), "completion": "b" * (n % 11 + 1)} for n in range(40)]
    build([write(folder / "a.jsonl", records)], folder / "set", BYTES, format="sft")
    return folder / "set"


def held(sample: dict[str, torch.Tensor]) -> list[list[int]]:
    """The tokens of each example of a sample."""
    totals, places = (sample[key] for key in ("document_totals", "document_places"))
    lengths, starts = totals.diff().tolist(), places[:-1].tolist()
    rows = sample["tokens"].tolist()
    return [rows[start : start + length] for start, length in zip(starts, lengths, strict=True) if length]


def test_each_epoch_deals_each_example_once_and_whole(prefix: Path) -> None:
    found = dataset(prefix, None)
    dealt = [example for i in range(len(found)) for example in held(found[i])]
    indexed = open_indexed(prefix)
    assert sorted(dealt) == sorted(indexed[i].tolist() for i in range(40))
    predicted = 0
    for sample in (found[i] for i in range(len(found))):
        assert int(sample["document_places"][-1]) == SEQ
        counted = sample["loss_mask"].bool()
        assert set(sample["labels"][counted].tolist()) <= {ord("b"), 256}
        predicted += int(counted.sum())
    assert predicted == np.fromfile(examples.path(prefix), dtype=np.uint8).sum()


def test_samples_are_the_same_however_many_are_asked_for(prefix: Path) -> None:
    few, many = dataset(prefix, 7), dataset(prefix, 90)  # several epochs
    assert (len(few), len(many)) == (7, 90)
    for i in range(7):
        assert all(torch.equal(few[i][key], many[i][key]) for key in few[i])
    other = dataset(prefix, 7, seed=2)
    assert any(not torch.equal(few[i]["tokens"], other[i]["tokens"]) for i in range(7))
    assert not few[None]["loss_mask"].any()


def test_sets_that_do_not_fit_are_refused(prefix: Path, tmp_path: Path) -> None:
    long = write(tmp_path / "a.jsonl", [{"prompt": "a" * 40, "completion": "b"}])
    build([long], tmp_path / "long", BYTES, format="sft")
    with pytest.raises(ValueError, match=r"an example of 42 tokens, a sample has 32: .* data build --longest 32"):
        dataset(tmp_path / "long", 4)
    examples.path(tmp_path / "long").write_bytes(b"\0")
    with pytest.raises(ValueError, match=r"long.loss is about 1 tokens, .*long holds 42: build it again"):
        dataset(tmp_path / "long", 4)


def test_the_embedded_examples_are_docstrings_and_functions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = tmp_path / "a.py"
    source.write_text(
        'def f(x):\n    """Twice."""\n    return 2 * x\n\n\ndef g():\n    """Nothing."""\n\n\ndef h(): ...\n'
    )
    monkeypatch.setattr(docstrings, "standard_library_sources", lambda: [source])
    assert list(docstrings.examples()) == [
        {"prompt": '"""Twice."""\n', "completion": "def f(x):\n    return 2 * x\n"},
        {"prompt": '"""Nothing."""\n', "completion": "def g():\n    pass\n"},
    ]
    built = docstrings.build_default(tmp_path / "data")
    assert docstrings.build_default(tmp_path / "data") == built  # and leaves it as it is
    assert len(open_indexed(built)) == 2

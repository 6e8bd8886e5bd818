"""Tokenizers of a few hundred tokens, made on the spot."""

import base64
import json
from pathlib import Path

import pytest

from megatron_attn2d.data.tokenizers import TokenizerChoice

TEXTS = [
    "Ring attention passes every key by every rank.\n",
    "Two dimensions gather queries in rows, keys in columns.\n" * 3,
    "def größer(a, b):\n    return a > b  # ✓\n",
]


def _sentencepiece(folder: Path) -> TokenizerChoice:
    import sentencepiece

    text = folder / "text.txt"
    text.write_text("\n".join(TEXTS * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "sp"),
        vocab_size=300,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=3,
    )
    return TokenizerChoice("sentencepiece", str(folder / "sp.model"))


def _huggingface(folder: Path) -> TokenizerChoice:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return TokenizerChoice("huggingface", str(folder))


def _tiktoken(folder: Path) -> TokenizerChoice:
    tokens = [bytes([byte]) for byte in range(256)] + [b"th", b"in", b" t", b" k", b"es"]
    ranks = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": token.decode(errors="replace")}
        for rank, token in enumerate(tokens)
    ]
    (folder / "vocab.json").write_text(json.dumps(ranks))
    return TokenizerChoice("tiktoken", str(folder / "vocab.json"), vocab_size=1000 + len(tokens))


_MAKERS = {"sentencepiece": _sentencepiece, "huggingface": _huggingface, "tiktoken": _tiktoken}


@pytest.fixture(scope="session", params=["bytes", *_MAKERS])
def choice(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TokenizerChoice:
    """A tokenizer of each kind."""
    if request.param == "bytes":
        return TokenizerChoice()
    return _MAKERS[request.param](tmp_path_factory.mktemp(request.param))

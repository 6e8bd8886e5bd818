"""Which arguments of a checkpoint describe other weights than those of a run, and how a load that fails is told."""

from argparse import Namespace
from typing import Any

import pytest

RUN: dict[str, Any] = {
    "num_layers": 2,
    "num_attention_heads": 4,
    "group_query_attention": False,
    "num_query_groups": 1,
    "position_embedding_type": "rope",
    "tokenizer_type": "HuggingFaceTokenizer",
}


@pytest.mark.parametrize(
    ("theirs", "ours", "said"),
    [
        ({}, {}, []),
        ({"num_query_groups": 4}, {}, []),  # upstream writes down that each query head has keys of its own
        ({"num_layers": 3}, {}, ["model.num_layers is 3 in this checkpoint and 2 here; choose 3, or another"]),
        (
            {"group_query_attention": True, "num_query_groups": 2},
            {},
            ["model.num_query_groups is 2 in this checkpoint and 4 here; choose 2, or another checkpoint"],
        ),
    ],
)
def test_differences(theirs: dict[str, Any], ours: dict[str, Any], said: list[str]) -> None:
    from megatron_attn2d.training.guards.fitting import differences

    found = list(differences(Namespace(**RUN | theirs), Namespace(**RUN | ours)))
    assert len(found) == len(said)
    assert all(line.startswith(start) for line, start in zip(found, said, strict=True))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (SystemExit(), "Megatron gave it up, and its log, logs/rank-0.log, says why"),
        (KeyError("optimizer"), "it holds no 'optimizer', as with no_save_optim; take the weights alone by ..."),
        (RuntimeError("[gloo] Timed out waiting 1000ms for recv"), ""),
        (
            RuntimeError("(TP, PP) mismatch: not supported for DistributedOptimizer with"),
            "it does not fit this run: ...",
        ),
    ],
)
def test_how_a_load_that_fails_is_told(error: BaseException, said: str) -> None:
    from megatron_attn2d.training.guards.fitting import _in_words

    assert _in_words(error) == said or (said.endswith("...") and _in_words(error).startswith(said[:-3]))

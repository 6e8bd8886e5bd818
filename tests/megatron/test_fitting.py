"""Which arguments of a checkpoint describe other weights than those of a run."""

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
    from megatron_attn2d.megatron.fitting import differences

    found = list(differences(Namespace(**RUN | theirs), Namespace(**RUN | ours)))
    assert len(found) == len(said)
    assert all(line.startswith(start) for line, start in zip(found, said, strict=True))

"""How long documents are."""

from pathlib import Path

import numpy as np

from megatron_attn2d.data import histogram
from megatron_attn2d.data.histogram import Bucket, buckets


def test_buckets_double_from_the_shortest_document_to_the_longest() -> None:
    assert buckets(np.array([3, 2, 9, 15, 8], dtype=np.int32)) == [
        Bucket(2, 3, 2, 5),
        Bucket(4, 7, 0, 0),
        Bucket(8, 15, 3, 32),
    ]
    edges = np.array([1, 2**20 - 1, 2**20, 2**31 - 1])
    assert [bucket.first for bucket in buckets(edges) if bucket.documents] == [1, 2**19, 2**20, 2**30]


def test_lines_show_documents_tokens_and_padding(tmp_path: Path) -> None:
    assert list(histogram.lines(np.array([3, 2, 9, 15, 8]))) == [
        "documents by tokens, and their share of all tokens:",
        "   2 to 3             2   13.5%  ######################",
        "   4 to 7             0    0.0%",
        "  8 to 15             3   86.5%  ################################",
        "padding as sequences of their own, by context ranks: 33.9% on 4, 76.9% on 16, 94.2% on 64",
    ]
    histogram.draw(np.array([3, 2, 9, 15, 8]), "Five documents", tmp_path / "deep" / "lengths.png")
    assert (tmp_path / "deep" / "lengths.png").read_bytes().startswith(b"\x89PNG")

"""The drills of repetition: runs on 8 ranks, in every mode and grid, that must equal each other bit for bit."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.guarantees.test_determinism import assert_deterministic
from tests.megatron.runs import context_parallel
from tests.pool import RankPool
from tests.training.test_resume import assert_resumes


def _sized(ranks: int, *sizes: int) -> dict[str, Any]:
    """attention2d with heads or tiles beside rows and columns."""
    return {**context_parallel("attention2d", 1, ranks), "hierarchical_context_parallel_sizes": list(sizes)}


TP2: dict[str, Any] = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "num_query_groups": 4}
PP2: dict[str, Any] = {"pipeline_model_parallel_size": 2, "num_layers": 2}
BOTH = "TP2 x PP2"
SPLITS: dict[str, dict[str, Any]] = {"TP2": TP2, "PP2": PP2, BOTH: {**TP2, **PP2}}
GRIDS_OF_4: dict[str, dict[str, Any]] = {
    "2x2": context_parallel("attention2d", 2, 2),
    "4x1": context_parallel("attention2d", 4, 1),
    "1x4": context_parallel("attention2d", 1, 4),
    "2x2x1": _sized(4, 2, 2, 1),
    "2x1x2": _sized(4, 2, 1, 2),
    "tile 1x2": _sized(4, 1, 2, 2, 1),
    "ring": context_parallel("p2p", 1, 4),
    "all_gather": context_parallel("all_gather", 1, 4),
    "ulysses": {**context_parallel("a2a", 1, 4), "num_attention_heads": 8},
}
"""Of 4 context-parallel ranks, which TP2 or PP2 makes 8."""
GRIDS_OF_2: dict[str, dict[str, Any]] = {
    "1x2": context_parallel("attention2d", 1, 2),
    "2x1": context_parallel("attention2d", 2, 1),
    "2x1x1": _sized(2, 2, 1, 1),
    "tile 1x2 of 1x2": _sized(2, 1, 2, 1, 1),
    "tile 2x1 of 2x1": _sized(2, 2, 1, 1, 1),
    "ring": context_parallel("p2p", 1, 2),
    "all_gather": context_parallel("all_gather", 1, 2),
    "ulysses": context_parallel("a2a", 1, 2),
}
"""Of 2 context-parallel ranks, which TP2 and PP2 together make 8."""


def determinism(count: int) -> str:
    """Two runs of `count` steps of each mode on 8 ranks: losses, weights and states bit for bit."""
    pairs, modes = _on_8_ranks(assert_deterministic, list(SPLITS), count)
    return f"{pairs} of {pairs} pairs of runs equal ({modes})"


def resume(count: int) -> str:
    """Runs of `count` steps on 8 ranks, stopped and resumed half-way, against undisturbed ones: bit for bit."""
    pairs, modes = _on_8_ranks(assert_resumes, [BOTH], count)
    return f"{pairs} of {pairs} resumed runs equal to undisturbed ones ({modes})"


def _on_8_ranks(compare: Callable[..., None], splits: list[str], count: int) -> tuple[int, str]:
    """Compares runs of every mode under every split; how many pairs there were, and of what."""
    ranks, pairs = RankPool(), 0
    names = {split: GRIDS_OF_2 if split == BOTH else GRIDS_OF_4 for split in splits}
    try:
        for split, modes in names.items():
            for name, mode in modes.items():
                options = {"num_layers": 1, "global_batch_size": 2, **SPLITS[split], **mode}
                with tempfile.TemporaryDirectory() as scratch:
                    compare(ranks, 8, Path(scratch), train_iters=count, mock_data=True, hidden_dropout=0.1, **options)
                pairs += 1
                print(f"equal: {split}, {name}", file=sys.stderr, flush=True)
    finally:
        ranks.close()
    return pairs, "; ".join(f"{split}: {', '.join(modes)}" for split, modes in names.items())

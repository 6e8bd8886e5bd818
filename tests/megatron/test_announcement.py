"""The line with which context parallelism introduces itself, in a launch of Megatron-LM and elsewhere."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

DERIVED = "no_create_attention_mask_in_dataloader, as no layer reads that mask of 16 GiB per sequence"
WITHOUT_LOSS = "; without --calculate-per-token-loss each rank's mean loss weighs the same, whatever it masks"


def said(capsys: pytest.CaptureFixture[str], args: Any = None, transformer_engine: bool = False, **changes: Any) -> str:
    """What rank 0 prints for a model of four layers on four context ranks."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_attn2d.megatron import announcement

    options = {"context_parallel_size": 4, "num_attention_heads": 4, "num_layers": 4, **changes}
    groups = options.pop("attention2d_head_groups", 1)
    config = TransformerConfig(hidden_size=64, **options)
    config.attention2d_head_groups = groups  # type: ignore[attr-defined]
    announcement.announce.cache_clear()
    with mock.patch.object(announcement, "launched_with", return_value=args):
        for _ in range(config.num_layers):
            announcement.introduce(config, None, (16, 16), config.attention_dropout, transformer_engine)
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("transformer_engine", "changes", "line"),
    [
        (
            False,
            {"cp_comm_type": "attention2d"},
            "attention2d on a grid of 2x2 (the one with the fewest bytes; attention2d:RxC says another) in all layers; "
            "kernel reference",
        ),
        (
            True,
            {"cp_comm_type": ["attention2d:1x4", "p2p", "p2p", "attention2d:1x4"], "attention2d_head_groups": 2},
            "layers 1, 4: attention2d on a grid of 1x4 (cp_comm_type) in 2 head groups; layers 2-3: ring (p2p) of "
            "Transformer Engine; kernels reference, Transformer Engine's",
        ),
        (
            True,
            {},
            "ring (p2p) of Transformer Engine: --cp-comm-type attention2d was not given; kernel Transformer Engine's",
        ),
        (
            False,
            {"cp_comm_type": "a2a", "window_size": (8, 0), "window_attn_skip_freq": 4},
            "ulysses (a2a) in all layers; kernels reference in windows, reference",
        ),
    ],
)
def test_modes_grids_and_kernels(
    transformer_engine: bool, changes: dict[str, Any], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = f"context parallelism over 4 ranks: {line}\n"
    assert said(capsys, transformer_engine=transformer_engine, **changes) == expected


def test_one_rank(capsys: pytest.CaptureFixture[str]) -> None:
    line = said(capsys, context_parallel_size=1, cp_comm_type="attention2d:4x4")
    assert line == (
        "context parallelism over 1 rank: attention2d:4x4 has no effect (context_parallel_size 1); kernel reference\n"
    )


@pytest.mark.parametrize(
    ("given", "changes", "line"),
    [
        (
            True,
            {},
            f"; derived: {DERIVED}",
        ),
        (False, {"calculate_per_token_loss": True}, ""),
    ],
)
def test_what_a_launch_left_out(
    given: bool, changes: dict[str, Any], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    args = SimpleNamespace(create_attention_mask_in_dataloader=given, seq_length=2**17)
    line += "" if changes else WITHOUT_LOSS
    found = said(capsys, args, cp_comm_type="attention2d:2x2", **changes)
    assert found.removesuffix("\n").endswith(f"(cp_comm_type) in all layers; kernel reference{line}")
    assert args.create_attention_mask_in_dataloader is False


def test_a_mask_that_arrives_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    from megatron_attn2d.megatron import announcement

    announcement.announce.cache_clear()
    for mask in (torch.ones(1, 1, 1, 1), *[torch.ones(2, 1, 512, 2048, dtype=torch.bool)] * 2):
        announcement.tell_unread_mask(mask)
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("context parallelism: each batch brings a mask of 2 MiB per rank, which attention does not")

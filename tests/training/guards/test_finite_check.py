"""NaN and Inf: reported where they arise, never lost in a merge, and not seen in large logits and empty rows."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_attn2d import Grid, attention2d, ring_attention
from megatron_attn2d.attention.merge import merge_partials
from tests.attention.dense import dense_gradients, inputs, zigzag
from tests.megatron.runs import arguments, context_parallel, metrics
from tests.pool import RankFailed, RankPool

MODES = [("attention2d", (2, 2)), ("attention2d", (4, 1)), ("attention2d", (1, 4)), ("ring", (1, 4))]
TENSORS = ("Q", "K", "V", "dO")
NAN, INF = float("nan"), float("inf")


def attend(rank: int, mode: str, shape: tuple[int, int], whole: list[torch.Tensor]) -> list[torch.Tensor]:
    group = torch.distributed.group.WORLD
    assert group is not None
    mine = zigzag(whole[0].size(0), 4, rank)
    q, k, v = (x[mine].requires_grad_() for x in whole[:3])
    if mode == "ring":
        out = ring_attention(q, k, v, group)
    else:
        out = attention2d(q, k, v, Grid.from_group(group, rows=shape[0], cols=shape[1]))
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), whole[3][mine])]


TOKEN = 5  # where a value is planted
FROM, UP_TO, HERE, ALL, NONE = slice(TOKEN, None), slice(TOKEN + 1), slice(TOKEN, TOKEN + 1), slice(None), slice(0)
REACHED: dict[str, tuple[slice, slice, slice, slice]] = {
    "Q": (HERE, HERE, UP_TO, UP_TO),
    "K": (FROM, FROM, ALL, ALL),
    "V": (FROM, FROM, ALL, NONE),
    "dO": (NONE, HERE, UP_TO, UP_TO),
}
"""Tokens whose output, dQ, dK and dV a number in one token reaches under the causal mask."""


def planted(rank: int, mode: str, shape: tuple[int, int]) -> list[str]:
    """Where a value planted in a tensor was lost on this rank, or reached another head."""
    wrong = []
    for name, value in [*itertools.product(TENSORS, [NAN]), ("V", INF), ("dO", -INF)]:
        whole = list(inputs(16, 1, (2, 2)))
        whole[TENSORS.index(name)][TOKEN, 0, 0, 3] = value
        found = attend(rank, mode, shape, whole)
        for what, x, reached in zip(("out", "dQ", "dK", "dV"), found, REACHED[name], strict=True):
            expected = torch.zeros(16, dtype=torch.bool)
            expected[reached] = True
            bad = ~x.isfinite().all(-1)[:, 0]
            # tokens just before it, in the same causal square, may be reached too: a kernel multiplies by 0 there
            if bad[:, 1].any() or (expected[zigzag(16, 4, rank)] & ~bad[:, 0]).any():
                wrong.append(f"{value} in {name}: {what}")
    return wrong


@pytest.mark.parametrize(("mode", "shape"), MODES)
def test_what_is_not_finite_reaches_all_that_see_it(pool: RankPool, mode: str, shape: tuple[int, int]) -> None:
    assert pool.run(planted, 4, mode, shape) == [[]] * 4


def test_a_merge_keeps_nan_whose_weight_underflows_and_drops_what_an_empty_row_left() -> None:
    outs = [torch.ones(2, 1, 1, 4), torch.full((2, 1, 1, 4), NAN)]
    out, lse = torch.empty(2, 1, 1, 4), torch.empty(1, 1, 2)
    merge_partials([outs], [[torch.zeros(1, 1, 2), torch.tensor([[[-1e4, -INF]]])]], [out], [lse])
    assert out[0].isnan().all(), "the row saw keys whose values are NaN"
    assert torch.equal(out[1], outs[0][1]), "the row saw no key there"
    merge_partials([outs], [[torch.full((1, 1, 2), -INF)] * 2], [out], [lse])
    assert torch.equal(out, torch.zeros_like(out))
    assert (lse == -INF).all()


def large(rank: int, mode: str, shape: tuple[int, int]) -> dict[torch.dtype, float]:
    """The largest error where logits reach +-1e4, relative to what the result is a product of."""
    whole = list(inputs(32, 1, (2, 1)))
    logits = torch.einsum("sbhd,tbhd->bhst", whole[0], whole[1].expand_as(whole[0])) * 8**-0.5
    whole[0] *= 1e4 / logits.abs().max()
    mine = zigzag(32, 4, rank)
    errors = {}
    for dtype in (torch.float64, torch.float32):
        rounded = [x.to(dtype) for x in whole]
        found = attend(rank, mode, shape, rounded)
        expected = dense_gradients(*(x.double() for x in rounded), True)
        q, k, v, dout = (x.abs().max() for x in whole)
        sizes = v, dout * v * k, dout * v * q, dout
        errors[dtype] = max(
            ((x - y[mine]).abs().max() / size).item() for x, y, size in zip(found, expected, sizes, strict=True)
        )
    return errors


@pytest.mark.parametrize(("mode", "shape"), MODES)
def test_logits_of_ten_thousand_stay_finite_and_right(pool: RankPool, mode: str, shape: tuple[int, int]) -> None:
    for errors in pool.run(large, 4, mode, shape):
        assert errors[torch.float64] <= 1e-11
        assert errors[torch.float32] <= 5e-3  # a log-sum-exp of 1e4 is good to 1e-3 in fp32


def train_with(rank: int, args: list[str], where: int, name: str, value: float) -> None:
    """Trains with `value` planted in a tensor of layer 2 of rank `where` in step 2."""
    from megatron.training import get_args

    from megatron_attn2d.megatron.core_attention import ContextParallelAttention
    from megatron_attn2d.training import pretrain_gpt
    from megatron_attn2d.training.guards import finite_check

    def corrupt(x: torch.Tensor) -> torch.Tensor:
        if rank != where or get_args().curr_iteration != 1:
            return x
        x = x.clone()
        x.view(-1)[3] = value
        return x

    def pre(module: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
        i = TENSORS.index(name)
        return tuple(corrupt(x) if at == i else x for at, x in enumerate(given))

    def post(module: Any, given: Any, out: torch.Tensor) -> None:
        out.register_hook(corrupt)

    def instead(attention: ContextParallelAttention, args: Any) -> Any:
        if attention.layer_number == 2:
            attention.register_forward_hook(post) if name == "dO" else attention.register_forward_pre_hook(pre)
        return watch(attention, args)

    watch = finite_check.watch
    with mock.patch.object(finite_check, "watch", instead):
        pretrain_gpt.main(args)


@pytest.mark.parametrize(("name", "value"), [("Q", -INF), ("K", INF), ("V", NAN), ("dO", NAN)])
def test_training_names_tensor_layer_rank_and_step(pool: RankPool, name: str, value: float, tmp_path: Path) -> None:
    args = arguments(
        run_dir=tmp_path,
        mock_data=True,
        num_layers=2,
        train_iters=3,
        check_finite_attention=True,
        **context_parallel("attention2d", 1, 2),
    )
    told = re.escape(f"NaN or Inf in {name} of attention in layer 2 at step 2 on rank 1")
    with pytest.raises(RankFailed, match=told):
        pool.run(train_with, 2, args, 1, name, value, timeout=120)
    assert [step["step"] for step in metrics(tmp_path)] == [1]

"""The arithmetic of Megatron-Core's own test of parallel attention, for every grid.

A self-attention layer on one rank is saved, and loaded into layers that are split over tensor-, sequence- and
context-parallel ranks: the same outputs, and the same gradients of inputs and weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.megatron.test_interchange import tensors
from tests.pool import RankPool

SEQUENCE, BATCH, HIDDEN, HEADS, GROUPS = 32, 2, 64, 8, 4

LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gate and norms": {"attention_output_gate": True, "qk_layernorm": True},
}
CASES = [
    ("plain", tp, sp, cp, grid)
    for tp, sp, cp in [(4, False, 1), (4, True, 1), (1, False, 4), (2, False, 2), (2, True, 2)]
    for grid in [[rows, cp // rows] for rows in range(1, cp + 1) if cp % rows == 0]
]
CASES += [("gate and norms", 1, False, 4, [2, 2]), ("gate and norms", 2, True, 2, [2, 1])]


@pytest.fixture(scope="module")
def whole(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Tensor, Tensor]]:
    """Of a kind of layer one rank's checkpoints of weights and of their gradients; output and the input's gradient."""

    @cache
    def attended(kind: str) -> tuple[Path, Tensor, Tensor]:
        directory = tmp_path_factory.mktemp("attention")
        [(_, out, gradient)] = pool.run(_attend, 1, kind, 1, False, 1, None, directory, True)
        return directory, out, gradient

    return attended


@pytest.mark.parametrize(("kind", "tp", "sp", "cp", "grid"), CASES)
def test_outputs_and_gradients_equal_those_of_one_rank(
    kind: str,
    tp: int,
    sp: bool,
    cp: int,
    grid: list[int],
    pool: RankPool,
    whole: Callable[[str], tuple[Path, Tensor, Tensor]],
    tmp_path: Path,
) -> None:
    start, out, gradient = whole(kind)
    for positions, own_out, own_gradient in pool.run(_attend, 4, kind, tp, sp, cp, grid, start, False, tmp_path):
        assert_close(own_out, out[positions])
        assert_close(own_gradient, gradient[positions])
    expected, found = tensors(start / "gradients"), tensors(tmp_path)
    assert expected.keys() == found.keys()
    # weights and biases of both projections, and of the norms
    assert len(expected) == (8 if LAYERS[kind] else 4)
    for name in expected:
        assert_close(found[name], expected[name])


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@contextmanager
def layer(kind: str, tp: int, sp: bool, cp: int, grid: list[int] | None) -> Iterator[Any]:
    """A self-attention layer of our spec on Megatron's groups, which end with the block."""
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.spec_utils import build_module
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_attn2d.megatron.layer_spec import attention2d_layer_spec
    from megatron_attn2d.megatron.upstream import cpu

    with cpu.seam():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tp, context_parallel_size=cp, hierarchical_context_parallel_sizes=grid
        )
        try:
            model_parallel_cuda_manual_seed(3)
            config = TransformerConfig(
                num_layers=1,
                hidden_size=HIDDEN,
                num_attention_heads=HEADS,
                num_query_groups=GROUPS,
                attention_dropout=0.0,
                transformer_impl="local",
                tensor_model_parallel_size=tp,
                sequence_parallel=sp,
                context_parallel_size=cp,
                cp_comm_type="attention2d",
                hierarchical_context_parallel_sizes=grid,
                **LAYERS[kind],
            )
            [spec] = attention2d_layer_spec(config).layer_specs  # type: ignore[union-attr]
            yield build_module(
                spec.submodules.self_attention,
                config=config,
                layer_number=1,
                cp_comm_type="attention2d",
                pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
            )
        finally:
            parallel_state.destroy_model_parallel()
            parallel_state._HIERARCHICAL_CONTEXT_PARALLEL_GROUPS = None  # upstream keeps them


def _attend(
    rank: int,
    kind: str,
    tp: int,
    sp: bool,
    cp: int,
    grid: list[int] | None,
    start: Path,
    first: bool,
    gradients: Path | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The positions that this rank holds, its output and its input's gradient; saves the gradients of the weights.

    The first to attend saves the weights, the others load them.
    """
    import torch.distributed as dist
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from megatron.core.pipeline_parallel.schedules import custom_backward, deallocate_output_tensor
    from megatron.core.utils import get_batch_on_this_cp_rank

    with layer(kind, tp, sp, cp, grid) as attention:
        context, tensor = parallel_state.get_context_parallel_group(), parallel_state.get_tensor_model_parallel_group()
        metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
        weights = start / "weights"
        if first:
            weights.mkdir()
            dist_checkpointing.save(attention.sharded_state_dict("layer.", metadata=metadata), str(weights))
        else:
            loaded = dist_checkpointing.load(attention.sharded_state_dict("layer.", metadata=metadata), str(weights))
            attention.load_state_dict({name.removeprefix("layer."): value for name, value in loaded.items()})

        generator = torch.Generator().manual_seed(4)
        hidden, dout = (torch.randn(SEQUENCE, BATCH, HIDDEN, generator=generator) for _ in range(2))
        batch = get_batch_on_this_cp_rank(
            {"positions": torch.arange(SEQUENCE)[None]}, is_hybrid_cp=False, cp_group=context
        )
        positions = batch["positions"][0]
        if sp:
            positions = positions.chunk(tp)[tensor.rank()]
        mine = hidden[positions].requires_grad_()
        rotary = RotaryEmbedding(HIDDEN // HEADS, 1.0, cp_group=context)(SEQUENCE)
        out, bias = attention(mine, None, rotary_pos_emb=rotary)
        out = out + bias
        result = out.detach().clone()
        deallocate_output_tensor(out, True)
        custom_backward(out, dout[positions])  # as Megatron does: torch's own would leave the seam
        for parameter in attention.parameters():
            dist.all_reduce(parameter.grad, group=context)
            if getattr(parameter, "sequence_parallel", False):
                dist.all_reduce(parameter.grad, group=tensor)
            parameter.data.copy_(parameter.grad)
        gradients = gradients or start / "gradients"
        gradients.mkdir(exist_ok=True)
        dist_checkpointing.save(attention.sharded_state_dict("layer.", metadata=metadata), str(gradients))
        return positions, result, mine.grad

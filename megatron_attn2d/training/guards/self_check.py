"""Compares one tiny attention over the run's own groups with dense attention on each rank, before the first step.

With a wrong layout or a wrong group a model trains fast, its loss differs by a thousandth, and it learns nothing of the
context. Here every rank makes the same short sequence from a fixed seed. It attends its shard of that through each
distinct attention of its layers, with the run's heads, dtype and mask, and compares output and gradients. The check
takes well under a second and draws nothing from the generators that training uses.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from math import log, sqrt
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from torch import Tensor

from megatron_attn2d.attention.layout import LOWER, UPPER
from megatron_attn2d.megatron.core_attention import ContextParallelAttention
from megatron_attn2d.megatron.upstream.patching import Patch, applied

# Errors relative to the largest value. In fp32 products may be TF32; a wrong shard has an error of about 1.
_TOLERANCE = {torch.bfloat16: 5e-2, torch.float16: 1e-2, torch.float32: 5e-3}
_MANY_RANKS = 128  # with so many ranks a chunk has one token, which keeps the dense scores small


class SelfCheckError(RuntimeError):
    """Attention over the run's groups is not attention over the whole sequence."""


def checked_before_training() -> AbstractContextManager[None]:
    """While entered, upstream's training loop begins with `check_attention` of the model's attentions."""

    def check_first(train: Any) -> Any:
        @functools.wraps(train)
        def checked(forward_step_func: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
            for attention in distinct_attentions(model):
                check_attention(attention)
            return train(forward_step_func, model, *args, **kwargs)

        return checked

    reason = "a wrong layout trains without an error: it must be found before the first step"
    return applied([Patch("megatron.training.training:train", check_first, reason)])


def attentions(model: Iterable[torch.nn.Module]) -> Iterator[ContextParallelAttention]:
    """All attentions of this package in the chunks of a model; those of Transformer Engine are not checked."""
    for chunk in model:
        yield from (module for module in chunk.modules() if isinstance(module, ContextParallelAttention))


def distinct_attentions(model: Iterable[torch.nn.Module]) -> list[ContextParallelAttention]:
    """One attention of each mode, grid and window."""
    return list(
        {
            (attention.mode, attention.grid, attention.window): attention
            for attention in reversed([*attentions(model)])
        }.values()
    )


def check_attention(attention: ContextParallelAttention) -> None:
    """Compare one attention with dense attention; all ranks of its context-parallel group must call it.

    Raises:
        SelfCheckError: they differ; names mode, grid and rank.
    """
    config = attention.config
    size, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    tensor_ranks = config.tensor_model_parallel_size
    heads = config.num_attention_heads // tensor_ranks
    kv_heads = max(1, (config.num_query_groups or config.num_attention_heads) // tensor_ranks)
    causal = attention.attn_mask_type == AttnMaskType.causal
    chunk = 4 if size < _MANY_RANKS else 1
    q, k, v, dout = _inputs(2 * size * chunk, heads, kv_heads, attention.head_dims, config.params_dtype)
    mine = _shard(size, rank, chunk, q.device)

    own = [x[mine].requires_grad_() for x in (q, k, v)]
    training = attention.training
    attention.eval()  # without dropout
    with torch.enable_grad():
        out = attention(*own, None).unflatten(2, (heads, -1))
        found = out, *torch.autograd.grad(out, own, dout[mine])
        mask = hidden(q.size(0), causal, attention.window, q.device)
        scale = softmax_scale(config)
        expected = dense(q, k, v, dout, mask, scale, attention.softmax_offset)
    attention.train(training)
    for name, x, y in zip(("its output", "dQ", "dK", "dV"), found, expected, strict=True):
        error = ((x.double() - y[mine]).abs().max() / y.abs().max()).item()
        if not error <= _TOLERANCE[config.params_dtype]:  # NaN included
            raise SelfCheckError(
                f"self-check of attention failed on rank {torch.distributed.get_rank()} (context rank {rank} of "
                f"{size}): {name} differs from dense attention by {error:.1e} of its size in {describe(attention)}, "
                f"where the model's softmax scale is {scale:.4g}. Training would go on without its context. Choose "
                "another context_parallel.mode or grid, and report it; training.self_check: false "
                "(--no-attention-self-check) starts nevertheless"
            )


def softmax_scale(config: TransformerConfig) -> float:
    """The factor of the scores by the model's configuration, independent of what its attentions were given."""
    if isinstance(config, MLATransformerConfig):
        factor, weight = config.rotary_scaling_factor, config.mscale_all_dim
        yarn = 1.0 if factor <= 1 else 0.1 * weight * log(factor) + 1.0
        return yarn**2 / sqrt(config.qk_head_dim + config.qk_pos_emb_head_dim)
    return 1 / sqrt(config.kv_channels) if config.softmax_scale is None else config.softmax_scale


def describe(attention: ContextParallelAttention) -> str:
    """Mode and grid of an attention, in words."""
    grid = attention.grid
    shape = f"a ring of {attention.ring.size()}" if attention.ring is not None else f"a grid of {grid.rows}x{grid.cols}"
    return f"mode {attention.mode} on {shape}{f' x {grid.ulysses_size} for heads' if grid.ulysses_size > 1 else ''}"


def _inputs(total: int, heads: int, kv_heads: int, dims: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and the output's gradient of the whole sequence, [s, 1, heads, d] in `dtype`, the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    shapes = (heads, dims[0]), (kv_heads, dims[0]), (kv_heads, dims[1]), (heads, dims[1])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return [torch.randn(total, 1, h, d, generator=generator).to(device, dtype) for h, d in shapes]


def _shard(size: int, rank: int, chunk: int, device: torch.device) -> Tensor:
    """Indices of a context-parallel rank's tokens, in the zigzag order of Megatron's loader."""
    first = torch.arange(chunk, device=device)
    starts = {LOWER: rank * chunk, UPPER: (2 * size - 1 - rank) * chunk}
    return torch.cat([starts[LOWER] + first, starts[UPPER] + first])


def hidden(tokens: int, causal: bool, window: tuple[int, int] | None, device: torch.device) -> Tensor:
    """Whether a query does not see a key, [queries, keys] = [s, s], bool."""
    left, right = window or (-1, -1)
    ahead = torch.arange(tokens, device=device)[None, :] - torch.arange(tokens, device=device)[:, None]
    unseen = (ahead > 0) & causal
    if left >= 0:
        unseen |= ahead < -left
    return unseen | (ahead > right) if right >= 0 else unseen


def dense(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, unseen: Tensor, scale: float, sink: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention of the whole sequence in float64, a key head at a time.

    Args:
        q: [s, b, heads, d].
        k: [s, b, kv_heads, d].
        v: [s, b, kv_heads, dv].
        dout: [s, b, heads, dv], the gradient of the output.
        unseen: [s, s], bool; see `hidden`.
        scale: the factor of the scores.
        sink: [heads], the score of one more key whose value is 0; None without it.

    Returns:
        The output and the gradients of q, k and v, in the shapes of dout, q, k and v.
    """
    shared = q.size(2) // k.size(2)
    parts = []
    for head in range(k.size(2)):
        mine = slice(head * shared, (head + 1) * shared)
        leaves = [x.detach().double().requires_grad_() for x in (q[:, :, mine], k[:, :, head], v[:, :, head])]
        scores = torch.einsum("sbhd,tbd->bhst", leaves[0], leaves[1]) * scale
        scores = scores.masked_fill(unseen, -torch.inf)
        if sink is not None:  # one more key, of value 0
            column = sink.detach()[mine].double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, column], -1)
        out = torch.einsum("bhst,tbd->sbhd", scores.softmax(-1)[..., : k.size(0)], leaves[2])
        dq, dk, dv = torch.autograd.grad(out, leaves, dout[:, :, mine].double())
        parts.append((out.detach(), dq, dk.unsqueeze(2), dv.unsqueeze(2)))
    whole_out, whole_dq, whole_dk, whole_dv = (torch.cat(part, 2) for part in zip(*parts, strict=True))
    return whole_out, whole_dq, whole_dk, whole_dv

"""The loss in chunks of tokens: losses and gradients of the plain loss, the vocabulary whole or spread over ranks."""

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy

from megatron_attn2d.training.chunked_loss import linear_cross_entropy
from tests.pool import RankPool

TOKENS, WIDTH, VOCABULARY = 29, 16, 48


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, weights with large scores, labels, and gradients of the losses, of which some are masked."""
    generator = torch.Generator().manual_seed(5)
    hidden, weight = (torch.randn(n, WIDTH, generator=generator).to(dtype) for n in (TOKENS, VOCABULARY))
    labels = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    dlosses = torch.rand(TOKENS, generator=generator).where(torch.arange(TOKENS) % 3 > 0, 0.0)
    return hidden, 4 * weight, labels, dlosses


def plain(dtype: torch.dtype) -> list[torch.Tensor]:
    """The losses, and the gradients of hidden states and weights, by torch's own cross entropy."""
    hidden, weight, labels, dlosses = inputs(dtype)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    losses = cross_entropy((hidden @ weight.t()).float(), labels, reduction="none")
    return [losses.detach(), *torch.autograd.grad(losses, leaves, dlosses)]


def chunked(rank: int, dtype: torch.dtype, chunk: int, ranks: int = 1) -> list[torch.Tensor]:
    hidden, weight, labels, dlosses = inputs(dtype)
    group = dist.group.WORLD if ranks > 1 else None
    leaves = [hidden.requires_grad_(), weight.chunk(ranks)[rank].clone().requires_grad_()]
    losses = linear_cross_entropy(*leaves, labels, chunk=chunk, group=group)
    return [losses.detach(), *torch.autograd.grad(losses, leaves, dlosses)]


@pytest.mark.parametrize("chunk", [1, 7, TOKENS, 1000])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_equals_the_plain_loss(dtype: torch.dtype, tolerance: float, chunk: int) -> None:
    for found, expected in zip(chunked(0, dtype, chunk), plain(dtype), strict=True):
        assert found.dtype == expected.dtype
        assert error(found, expected) <= tolerance


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest number."""
    return float((found - expected).abs().max() / expected.abs().max())


def test_a_vocabulary_over_ranks(pool: RankPool) -> None:
    results = pool.run(chunked, 3, torch.float32, 7, 3)
    losses, dhidden, dweight = plain(torch.float32)
    assert all(error(found[0], losses) <= 1e-5 for found in results)
    assert error(torch.stack([found[1] for found in results]).sum(0), dhidden) <= 1e-5
    assert error(torch.cat([found[2] for found in results]), dweight) <= 1e-5


def test_no_more_logits_than_a_chunk_has() -> None:
    """The largest tensor that either pass allocates."""
    hidden, weight, labels, dlosses = inputs(torch.float32)
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            found = result if isinstance(result, tuple) else (result,)
            sizes.extend(x.numel() for x in found if isinstance(x, torch.Tensor))
            return result

    with Watch():
        losses = linear_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(), labels, chunk=2)
        losses.backward(dlosses)
    assert max(sizes) == VOCABULARY * WIDTH

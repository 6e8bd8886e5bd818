"""The Triton kernels in Triton's interpreter against their torch versions; on GPUs `tests/gpu` runs them compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from megatron_attn2d.attention import merge


def compare_row_orders() -> None:
    """Of documents of a token, of many and of none at the end."""
    from megatron_attn2d.attention.kernels.triton.orders import row_orders
    from megatron_attn2d.attention.packing import Packing

    for chunks in ([5], [300, 1, 1, 44], [1] * 7 + [0, 0]):
        numbers = torch.tensor(chunks)
        packing = Packing(numbers, 8 * numbers, 4, sum(chunks), max(chunks), True, numbers.device)
        offsets = numbers.cumsum(0) - numbers
        for counts in ([1, 2, 7], [2, 0, 3], [2], [0]):
            found = row_orders(offsets.int(), numbers.int(), packing.tokens, counts)
            for slots, orders in zip(counts, found, strict=True):
                expected = packing.slot_rows(slots), packing.sequence_rows(slots)
                for order, rows in zip(orders, expected, strict=True):
                    assert order.dtype == torch.int32
                    assert torch.equal(order, rows), (chunks, slots)


def compare(d: int) -> None:
    """All four functions on tensors with strides of their own, empty rows and a row without gradient."""
    from megatron_attn2d.attention.kernels.triton import merges

    torch.manual_seed(0)
    n, b, h = 37, 2, 3
    outs = [torch.randn(n, b, h, d), torch.randn(n, 2 * b, h, d)[:, b:], torch.randn(b, n, h, d).transpose(0, 1)]
    lses = [torch.randn(b, h, n) * 5 for _ in outs]
    lses[0][:, :, 3] = -torch.inf
    outs[0][3] = torch.nan
    for lse in lses:
        lse[:, :, 5] = -torch.inf
    stack, stack_lses = torch.randn(5, n, b, h, d), torch.randn(5, b, 2 * h, n)[:, :, h:]
    results = []
    dout, whole, whole_lse = torch.randn(2, n, b, h, d), torch.randn(2, n, b, h, d), torch.randn(2, b, h, n)
    dout[0, 4] = 0
    for module in (merge, merges):
        out, lse = torch.empty(2, n, 2, b, h, d)[:, :, 1], torch.empty(2, b, 2 * h, n)[:, :, h:]
        module.merge_partials([outs, outs[1:]], [lses, lses[1:]], out.unbind(), lse.unbind())
        both = torch.empty(2, n, b, h, d), torch.empty(2, b, h, n)
        module.merge_partials([[stack, outs[0]], outs], [[stack_lses, lses[0]], lses], *(x.unbind() for x in both))
        total = torch.empty(8, n, b, h, d)
        several = [
            outs[1:],
            outs[2:],
            [outs[2], outs[1]],
            outs[1:2],
            outs[1:],
            [stack[1:], outs[1]],
            [stack],
            [stack[:1]],
        ]
        module.sum_partials(several, total.unbind())
        statistics = module.row_statistics(dout, whole, whole_lse)
        results.append((out, lse, *both, total, statistics, module.surrogate_out(dout, statistics[:, 1])))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not part of this torch")
def test_interpreted_kernels_agree_with_torch() -> None:
    # The interpreter is chosen when Triton is imported, hence a process of its own.
    calls = "test.compare(8), test.compare(80), test.compare_row_orders()"
    code = f"from tests.attention.kernels.triton import test_merges as test; {calls}"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

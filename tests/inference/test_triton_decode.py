"""The decode kernel without a GPU: interpreted, against masked attention in float64; `tests/gpu` runs it compiled."""

import os
import subprocess
import sys

import pytest
import torch

from megatron_attn2d.inference import partial

CASES = {  # query heads, key heads, head dim, value head dim, keys, window
    "groups": (4, 2, 16, 16, 130, None),
    "each head its own": (2, 2, 16, 16, 70, None),
    "odd dims": (3, 1, 24, 40, 90, None),
    "window": (4, 2, 16, 16, 150, 20),
}


def compare(case: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> float:
    """The largest difference, over sequences of which one has no key."""
    from megatron_attn2d.inference import triton_decode

    heads, key_heads, d, dv, keys, window = CASES[case]
    torch.manual_seed(0)
    shapes = ((3, heads, d), (3, keys + 1, key_heads, d), (3, keys + 1, key_heads, dv))
    q, k, v = (torch.randn(shape, dtype=dtype) for shape in shapes)
    ends = torch.tensor([keys, 0, keys // 2])
    key_positions = 2 * torch.arange(keys + 1).expand(3, -1).contiguous()  # of every other token
    positions = 2 * ends
    arguments = q, k, v, ends, key_positions, positions
    q_on, k_on, v_on, ends_on, *places = (x.to(device) for x in arguments)
    found = triton_decode.attend(q_on, k_on, v_on, ends_on, d**-0.5, window, *places).cpu()
    seen = torch.arange(keys + 1) < ends[:, None]
    if window is not None:
        seen &= key_positions >= (positions - window)[:, None]
    out, lse = partial.masked(*(x.double() for x in (q[:, None], k, v)), seen[:, None], d**-0.5)
    assert found[1, :, :-1].eq(0).all()
    assert found[1, :, -1].eq(-torch.inf).all()
    expected = torch.cat((out[:, 0], lse), -1)
    rows = [0, 2]
    return float((found[rows] - expected[rows]).abs().max())


def merges() -> float:
    """The largest difference of merged results, of which some are of no key."""
    from megatron_attn2d.inference import triton_decode

    torch.manual_seed(0)
    parts = torch.randn(5, 2, 3, 71)
    parts[:2, 0, :, -1] = -torch.inf
    out, lse = partial.merged([parts[..., :-1].double()], [parts[..., -1].mT.double()])
    return float((triton_decode.merge(parts) - torch.cat((out, lse.mT[..., None]), -1)).abs().max())


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs compiled in tests/gpu")
def test_interpreted() -> None:
    code = (
        "from tests.inference import test_triton_decode as t\n"
        "print(max([t.merges(), *(t.compare(case) for case in t.CASES)]))"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1e-5

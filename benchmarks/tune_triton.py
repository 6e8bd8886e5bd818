#!/usr/bin/env python3
"""Try sizes of blocks, warps and stages of the Triton attention on this GPU, and print the fastest.

    python benchmarks/tune_triton.py                          # head dim 128, without and with dropout; two minutes
    python benchmarks/tune_triton.py --head-dim 64 --tables   # packed: many short documents and a few long ones

Kernels compile in processes of their own, as many at once as there are cores. What comes first in each list is what
`kernels.triton.launch` should hold.
"""

from __future__ import annotations

import argparse
import os
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from itertools import product
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
import triton
from attention_kinds import Kind, Pack
from attention_timing import alone

from megatron_attn2d.attention.dropout import Dropout
from megatron_attn2d.attention.kernels.base import BackwardRows, Softmax
from megatron_attn2d.attention.kernels.triton import launch
from megatron_attn2d.attention.kernels.triton.kernel import TritonKernel
from megatron_attn2d.attention.layout import CAUSAL, FULL
from megatron_attn2d.attention.segments import Segments

# Rows, keys, warps and stages to try.
FORWARD = (
    *((128, 128, 8, stages) for stages in (2, 3)),
    *((128, 64, 8, stages) for stages in (2, 3, 4)),
    *((128, 64, 4, stages) for stages in (2, 3)),
    *((64, 64, 4, stages) for stages in (2, 3)),
    (64, 128, 4, 2),
    (128, 32, 4, 3),
)
BACKWARD_ROWS = (
    *((128, 64, 8, stages) for stages in (2, 3)),
    (128, 128, 8, 2),
    (128, 32, 8, 3),
    (128, 64, 4, 2),
    *((64, 64, 4, stages) for stages in (2, 3)),
    (64, 128, 4, 2),
    (64, 32, 4, 3),
)
BACKWARD_KEYS = (
    *((64, 128, 8, stages) for stages in (2, 3)),
    (128, 128, 8, 2),
    (32, 128, 8, 3),
    *((64, 64, 4, stages) for stages in (1, 2, 3)),
    (32, 128, 4, 2),
    (32, 64, 4, 3),
)
type Case = tuple[float, str, tuple[int, int, int, int]]
TRIALS = {"forward": FORWARD, "backward_rows": BACKWARD_ROWS, "backward_keys": BACKWARD_KEYS}


def tables(kernel: str, p: float) -> launch.Table:
    """The table that `launch` takes a kernel's sizes from, with dropout or without."""
    if kernel == "forward":
        return launch.forward_table(torch.empty(1, device="cuda"))
    if kernel == "backward_rows":
        return launch.BACKWARD_ROWS_DROPPED if p else launch.BACKWARD_ROWS
    return launch.BACKWARD_KEYS


def main() -> None:
    """Compile what is to be tried, time it, print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--tables", action="store_true", help="a pack of 64 documents under causal masks")
    parser.add_argument("--dropout", nargs="+", type=float, default=[0.0, 0.1])
    parser.add_argument("--calls", type=int, default=10)
    args = parser.parse_args()
    print(torch.cuda.get_device_name(), "Triton", triton.__version__)
    cases = [(p, kernel, sizes) for p in args.dropout for kernel, trials in TRIALS.items() for sizes in trials]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        fits = dict(zip(cases, pool.map(compiles, cases, [args] * len(cases)), strict=True))
    for p, kernel in product(args.dropout, TRIALS):
        mine = [case for case in cases if case[:2] == (p, kernel)]
        found = sorted((milliseconds(case, args), case[2]) for case in mine if fits[case] is None)
        print(f"dropout {p}, {kernel}: rows, keys, warps, stages")
        for taken, sizes in found:
            print(f"  {taken:8.3f} ms  {sizes}")
        for case in mine:
            if fits[case] is not None:
                print(f"  {fits[case]}  {case[2]}")


@cache
def _usual(p: float) -> dict[str, launch.Table]:
    """What the tables hold before this script changes them."""
    return {kernel: dict(tables(kernel, p)) for kernel in TRIALS}


def compiles(case: Case, args: argparse.Namespace) -> str | None:
    """Runs a kernel once, so that Triton's cache has it; why it does not run, or None."""
    try:
        alone(prepared(case, args), 1, "cuda")
    except Exception as error:  # whatever Triton says: other sizes are still to be tried
        return f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
    return None


def milliseconds(case: Case, args: argparse.Namespace) -> float:
    """Of calls back to back."""
    call = prepared(case, args)
    call()
    return alone(call, args.calls, "cuda")


def prepared(case: Case, args: argparse.Namespace) -> Any:
    """A call of forward, or of backward as a whole, with these sizes of one kernel and the usual ones of the other."""
    p, kernel, sizes = case
    for name, usual in _usual(p).items():
        tables(name, p).update(usual)
    tables(kernel, p)[max(64, args.head_dim)] = sizes
    torch.manual_seed(0)
    q, k, v, dout = (
        torch.randn(args.tokens, args.heads, args.head_dim, device="cuda", dtype=torch.bfloat16) for _ in "qkvo"
    )
    how = Softmax(args.head_dim**-0.5)
    if p:
        positions = torch.arange(args.tokens, device="cuda")[None]
        seed = torch.ones(1, dtype=torch.int64, device="cuda")
        how = Softmax(how.scale, Dropout(p, seed).at(positions[0, :1], args.heads, positions, positions))
    lse, delta = torch.ones(2, args.heads, args.tokens, device="cuda")
    if not args.tables:
        q, k, v, dout, lse, delta = (x.unsqueeze(1) if x.dim() == 3 else x[None] for x in (q, k, v, dout, lse, delta))
        if kernel == "forward":
            return partial(TritonKernel().forward, q, k, v, FULL, how)
        return partial(TritonKernel().backward, BackwardRows(q, dout, lse, delta, None), k, v, FULL, how)
    lengths = Pack.drawn(Kind("packed", args.tokens, 1, 1, documents=64), 1, 0).lengths
    starts = np.cumsum([0, *lengths[:-1]])
    numbers = np.stack((starts, lengths, starts, lengths), 1)
    table = Segments.of(numbers, CAUSAL, args.tokens, args.tokens, q.device)
    if kernel == "forward":
        return partial(TritonKernel().forward_segments, q, k, v, table, how, (torch.empty_like(q), lse))
    into = tuple(map(torch.empty_like, (q, k, v)))
    return partial(TritonKernel().backward_segments, BackwardRows(q, dout, lse, delta, None), k, v, table, how, into)


if __name__ == "__main__":
    main()

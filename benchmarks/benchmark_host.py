#!/usr/bin/env python3
"""Time what the CPU takes to start one call of attention, forward and backward, at 4 to 1,024 ranks.

    python benchmarks/benchmark_host.py --json host.json --plot host.png       # one GPU, real kernels
    python benchmarks/benchmark_host.py --device cpu                           # empty kernels: our Python alone

This process is one rank of a world whose other ranks are faked (`faked_world`): messages are handed to
torch.distributed and go nowhere, so results are wrong and times are those of the CPU. Host time is the time until a
call returns, with nothing queued before it and no synchronisation inside; a figure is the median of the calls. On GPUs
kernel time is the sum of what a call's kernels took, without messages, and launches count its kernels, copies and
fills. On CPU time is what this process took of it, and the operators are counted that launch something on GPUs.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from attention_modes import Attention, Shape, refusal, transformer_engine
from faked_world import faked_world
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_attn2d import attention2d
from megatron_attn2d.attention import attention2d as algorithm
from megatron_attn2d.attention import call, comm, partials
from megatron_attn2d.attention.kernels import base
from megatron_attn2d.attention.kernels.base import BackwardRows
from megatron_attn2d.pictures import blank, ruled, save

CASES = [
    (4, 2**14, "12/12", ["4x1", "2x2", "4x1x1"]),
    (4, 2**14, "16/2", ["4x1", "2x2", "2x2x1"]),
    (4, 2**15, "40/40", ["2x2"]),
    (16, 2**15, "40/40", ["4x4"]),
    (64, 2**15, "40/40", ["8x8", "8x4x2", "64x1", "8x8:2x4"]),
    (64, 2**17, "8/1", ["16x4", "64x1"]),
    (256, 2**15, "40/40", ["16x16"]),
    (256, 2**17, "16/16", ["16x16"]),
    (1024, 2**15, "40/40", ["32x32", "32x32:2x4"]),
]
"""Ranks, tokens of the sequence, query/key heads, grids of attention2d."""

MOST_RING_RANKS = 256
"""Transformer Engine's ring takes half a second per call on more."""


def main() -> None:
    """Measure every case, print, write and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--most-ranks", type=int, default=1024, help="leave out cases of more ranks")
    parser.add_argument("--head-dim", type=int, help="128, on CPU 8")
    parser.add_argument("--chunk", type=int, help="tokens of a chunk, instead of the case's length; on CPU 2")
    parser.add_argument("--calls", type=int, default=15, help="timed calls, after 3 that warm up")
    parser.add_argument("--modes", nargs="+", default=["te:p2p", "te:all_gather", "attention2d"])
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--plot", type=Path, help="draw a PNG here")
    args = parser.parse_args()
    on_cpu = args.device == "cpu"
    args.head_dim = args.head_dim or (8 if on_cpu else 128)
    args.chunk = args.chunk or (2 if on_cpu else None)
    if on_cpu:
        torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with empty_kernels() if on_cpu else contextlib.nullcontext():
        for ranks, seq, heads, shapes in CASES:
            if ranks > args.most_ranks:
                continue
            tokens = 2 * ranks * args.chunk if args.chunk else seq
            with faked_world(ranks):
                for mode, build in modes(ranks, heads, shapes, args):
                    case = {"ranks": ranks, "seq": tokens, "heads": heads, "mode": mode}
                    rows.append(case | attempt(build, tokens // ranks, *map(int, heads.split("/")), args))
                    show(rows[-1])
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    if args.plot:
        plot(rows, args.plot)


def modes(
    ranks: int, heads: str, shapes: list[str], args: argparse.Namespace
) -> Iterator[tuple[str, Callable[[], Attention]]]:
    """The attention functions to compare, by name."""
    h, g = map(int, heads.split("/"))
    for mode in args.modes:
        if mode == "attention2d":
            for shape in shapes:
                yield f"attention2d {shape}", partial(ours, shape)
        elif args.device == "cuda":
            comm = mode.removeprefix("te:")
            if (comm != "p2p" or ranks <= MOST_RING_RANKS) and not refusal(comm, ranks, h, g):
                yield f"TE {comm}", partial(transformer_engine, comm, h, g, args.head_dim)


def ours(shape: str) -> Attention:
    """attention2d on a grid of the faked world."""
    return partial(attention2d, grid=Shape.parse(shape).build())


def attempt(build: Callable[[], Attention], tokens: int, h: int, g: int, args: argparse.Namespace) -> dict[str, Any]:
    """What was measured, or why not."""
    try:
        return measure(build(), tokens, h, g, args)
    except (ImportError, RuntimeError, AssertionError, ValueError) as error:
        return {"failed": (str(error).strip().splitlines() or [type(error).__name__])[0][:100]}


def measure(attention: Attention, tokens: int, h: int, g: int, args: argparse.Namespace) -> dict[str, Any]:
    """Host milliseconds of both passes, milliseconds of kernels, and launches."""
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    q, k, v, dout = (torch.zeros(tokens, 1, n, args.head_dim, dtype=dtype, device=args.device) for n in (h, g, g, h))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    synchronise, clock = (
        (torch.cuda.synchronize, time.perf_counter) if args.device == "cuda" else (nothing, time.process_time)
    )

    def call() -> tuple[float, float]:
        synchronise()
        begin = clock()
        out = attention(*leaves)
        middle = clock()
        torch.autograd.grad(out, leaves, dout.view_as(out))
        return (middle - begin) * 1e3, (clock() - middle) * 1e3

    for _ in range(3):
        call()
    gc.collect()
    gc.disable()
    forward, backward = zip(*(call() for _ in range(args.calls)), strict=True)
    gc.enable()
    both = [sum(pair) for pair in zip(forward, backward, strict=True)]
    row = {
        "forward_ms": statistics.median(forward),
        "backward_ms": statistics.median(backward),
        "host_ms": statistics.median(both),
    }
    return row | (kernels(call) if args.device == "cuda" else operators(call))


def kernels(call: Callable[[], object]) -> dict[str, Any]:
    """Milliseconds of a call's kernels and their number, copies and fills included; messages are faked."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    on_gpu = [
        event
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]
    return {"kernel_ms": sum(event.time_range.elapsed_us() for event in on_gpu) / 1e3, "launches": len(on_gpu)}


def operators(call: Callable[[], object]) -> dict[str, Any]:
    """The operators that a call hands to torch's dispatcher, views left out, as they launch nothing."""
    with Operators() as counted:
        call()
    return {"launches": counted.launching}


class Operators(TorchDispatchMode):
    """Counts operators, those that launch something on a GPU apart: not views, not allocations."""

    _NO_LAUNCH = frozenset(
        f"aten::{name}"
        for name in (
            "empty.memory_format",
            "new_empty",
            "empty_like",
            "detach",
            "promote_types",
            "_unsafe_view",
        )
    )

    def __init__(self) -> None:
        super().__init__()
        self.total = self.launching = 0
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.total += 1
        if not func.is_view and func.name() not in self._NO_LAUNCH:
            self.launching += 1
            self.names.append(func.name())
        return found


@contextlib.contextmanager
def empty_kernels() -> Iterator[None]:
    """Kernels, merges and sums that allocate what those of GPUs do and compute nothing: what is left is our Python."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(call, "choose_kernel", return_value=EmptyKernel()))
        for module in (comm, partials):
            for name in ("merge_partials", "sum_partials"):
                stack.enter_context(mock.patch.object(module, name, nothing))
        stack.enter_context(mock.patch.object(algorithm, "row_statistics", empty_statistics))
        stack.enter_context(mock.patch.object(base, "surrogate_out", lambda dout, delta: torch.empty_like(dout)))
        yield


class EmptyKernel:
    """Allocates results."""

    name, needs_out, deterministic = "empty", True, True

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        """See `Kernel.forward`."""
        out = q.new_empty((*q.shape[:3], v.size(3)))
        return out, q.new_empty((q.size(1), q.size(2), q.size(0)), dtype=torch.float32)

    def backward(self, rows: BackwardRows, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
        """See `Kernel.backward`."""
        return rows.q.new_empty(rows.q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def empty_statistics(dout: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    """See `merge.row_statistics`."""
    return lse.new_empty((2, *lse.shape))


def nothing(*_: Any) -> None:
    """What an empty kernel does."""


def show(row: dict[str, Any]) -> None:
    """Print a row."""
    head = f"{row['ranks']:4d} ranks  S={row['seq']:6d}  h={row['heads']:6s} {row['mode']:22s}"
    if "failed" in row:
        print(head, row["failed"], flush=True)
        return
    on_gpu = f"  kernels {row['kernel_ms']:7.3f} ms" if "kernel_ms" in row else ""
    both = f"forward {row['forward_ms']:7.3f}  backward {row['backward_ms']:7.3f}  host {row['host_ms']:7.3f} ms"
    print(f"{head} {both}{on_gpu}  launches {row['launches']:5d}", flush=True)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Host time against ranks, and the kernels' beside it where they are known."""

    heads = max((row["heads"] for row in rows), key=[row["heads"] for row in rows].count)
    rows = [row for row in rows if row["heads"] == heads and "failed" not in row]
    figure = blank(7, 4.2, dpi=150)
    axes = figure.subplots()
    series: dict[str, dict[int, float]] = {}
    for row in rows:
        best = series.setdefault(row["mode"].split()[0] if "attention2d" in row["mode"] else row["mode"], {})
        best[row["ranks"]] = min(best.get(row["ranks"], float("inf")), row["host_ms"])
    if any("kernel_ms" in row for row in rows):
        ours = [row for row in rows if row["mode"].startswith("attention2d")]
        series["kernels of attention2d"] = {row["ranks"]: row["kernel_ms"] for row in ours}
    for name, times in series.items():
        points = sorted(times.items())
        axes.plot(*zip(*points, strict=True), marker="o", label=name, linestyle=":" if "kernels" in name else "-")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ranks = sorted({row["ranks"] for row in rows})
    axes.set_xticks(ranks, [f"{n:,}" for n in ranks])
    axes.set_xlabel("context-parallel ranks (one real, the others faked)")
    axes.set_ylabel("ms per call, forward and backward")
    axes.set_title(f"Host time of one attention call, {heads} heads, {rows[0]['seq'] // 1024}K tokens", loc="left")
    ruled(axes)
    axes.legend(frameon=False)
    save(figure, path)


if __name__ == "__main__":
    main()

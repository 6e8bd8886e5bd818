"""How the benchmarks time attention, forward and backward: calls back to back, a call alone, and the host's part."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

type Attention = Callable[..., Tensor]
"""From q, k, v, and where the kind has one a sink, to the output."""

BACK_TO_BACK_MS = 40
"""How long the calls of one repeat take together, where `inner` is 0."""
UNQUEUED_CALLS = 5


def measure(attention: Attention, leaves: Sequence[Tensor], dout: Tensor, args: argparse.Namespace) -> dict[str, float]:
    """What forward and backward cost on the slowest rank.

    Args:
        attention: called with `leaves`.
        leaves: inputs that need gradients.
        dout: gradient of the output.
        args: device; warmup, repeats, seconds (0: no limit), inner (0: see BACK_TO_BACK_MS): of the timed calls;
            forward: no backward pass; graphs: a replayed CUDA graph; alone: also what `unqueued` measures.

    Returns:
        first_s: of the first call, which compiles kernels and connects ranks; ms: the median over repeats; spread:
        between repeats, relative; mib: the peak of allocated memory above the inputs; and those of `unqueued`.
    """

    def call() -> None:
        both_passes(attention, leaves, dout, args)

    begin = time.perf_counter()
    timed(call, 1, args.device)
    first = time.perf_counter() - begin
    for _ in range(args.warmup - 1):
        call()
    transient = peak(call) if args.device == "cuda" else 0.0
    timed_call = captured(call) if args.graphs else call
    once = max(timed(timed_call, 1, args.device), 1e-3)
    inner = args.inner or max(1, int(BACK_TO_BACK_MS / once))
    fitting = int(args.seconds * 1e3 / (inner * once)) if args.seconds else args.repeats
    times = [timed(timed_call, inner, args.device) for _ in range(max(1, min(fitting, args.repeats)))]
    row = {
        "first_s": first,
        "ms": statistics.median(times),
        "spread": (max(times) - min(times)) / min(times),
        "mib": slowest(transient, args.device),
    }
    if args.alone and not args.graphs and not args.forward:
        fitting = int(args.seconds * 1e3 / once) if args.seconds else UNQUEUED_CALLS
        row |= unqueued([attention] * max(1, min(fitting, UNQUEUED_CALLS)), leaves, dout, args.device)
    return row


def both_passes(attention: Attention, leaves: Sequence[Tensor], dout: Tensor, args: argparse.Namespace) -> None:
    """One call, and with it the backward pass unless `args.forward`."""
    out = attention(*leaves)
    if not args.forward:
        torch.autograd.grad(out, leaves, dout.view_as(out))


def unqueued(calls: Sequence[Attention], leaves: Sequence[Tensor], dout: Tensor, device: str) -> dict[str, float]:
    """Medians of calls that find the GPU idle, ms, on the slowest rank.

    Returns:
        host_forward_ms, host_backward_ms: until the call returns, its kernels queued; alone_ms: until they have ended.
    """
    times = []
    for attention in calls:
        slowest(0.0, device)  # all ranks start together, nothing is queued
        begin = time.perf_counter()
        out = attention(*leaves)
        forward = time.perf_counter()
        torch.autograd.grad(out, leaves, dout.view_as(out))
        backward = time.perf_counter()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append((forward - begin, backward - forward, time.perf_counter() - begin))
    names = ("host_forward_ms", "host_backward_ms", "alone_ms")
    medians = (statistics.median(column) * 1e3 for column in zip(*times, strict=True))
    return {name: slowest(ms, device) for name, ms in zip(names, medians, strict=True)}


def captured(call: Callable[[], None]) -> Callable[[], None]:
    """The call as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Other threads, NCCL's watchdog above all, go on meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        call()
    return graph.replay


def peak(call: Callable[[], None]) -> float:
    """MiB that a call allocates at its peak above what was allocated before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def timed(call: Callable[[], None], inner: int, device: str) -> float:
    """Milliseconds per call on the slowest rank, which all ranks agree on."""
    slowest(0.0, device)  # all ranks start together
    return slowest(alone(call, inner, device), device)


def alone(call: Callable[[], object], inner: int, device: str) -> float:
    """Milliseconds per call on this rank, of `inner` back to back."""
    if device == "cpu":
        begin = time.perf_counter()
        for _ in range(inner):
            call()
        return (time.perf_counter() - begin) * 1e3 / inner
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(inner):
        call()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / inner


def slowest(value: float, device: str) -> float:
    """The largest value of all ranks."""
    highest = torch.tensor([value], device=device, dtype=torch.float64)
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    return highest.item()

"""What the attention benchmarks share: ranks on GPUs or CPU, emulated nodes, and the attention functions to compare."""

from __future__ import annotations

import argparse
import os
import socket
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_attn2d import Grid, attention2d, ring_attention

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Ranks, sizes and modes."""
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count() or 2, help="context-parallel ranks")
    parser.add_argument("--nodes", action="store_true", help="pose as one node a rank")
    parser.add_argument("--heads", nargs="+", default=["12/12", "16/2"], help="query/key heads")
    parser.add_argument("--modes", nargs="+", default=["te:p2p", "te:all_gather", "te:a2a", "ring", "attention2d"])
    parser.add_argument("--grids", nargs="*", help="RxC or UxRxC; default: all RxC of --ranks")
    parser.add_argument("--groups", nargs="+", type=int, default=[0], help="head groups of attention2d; 0: automatic")
    parser.add_argument("--backends", nargs="+", default=["auto"], help="kernels of ring and attention2d")
    parser.add_argument("--head-dim", type=int, default=128)


def spawn(function: Callable[..., None], args: argparse.Namespace) -> None:
    """Run function(rank, args) on args.ranks processes that form one world."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(_run, (function, args, port), nprocs=args.ranks)


def _run(rank: int, function: Callable[..., None], args: argparse.Namespace, port: int) -> None:
    if args.nodes:
        os.environ |= {
            "NCCL_HOSTID": f"node{rank}",
            "NCCL_SOCKET_IFNAME": "lo",
            "NCCL_P2P_DISABLE": "1",
            "NCCL_SHM_DISABLE": "1",
            "NCCL_NET": "Socket",
        }
    if args.device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    else:
        torch.set_num_threads(1)
    backend = "nccl" if args.device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=args.ranks)
    function(rank, args)
    dist.destroy_process_group()


def build_grids(args: argparse.Namespace) -> dict[str, Grid]:
    """The grids to compare, by name."""
    shapes = [tuple(map(int, g.split("x"))) for g in args.grids or []] or [
        (r, args.ranks // r) for r in range(1, args.ranks + 1) if args.ranks % r == 0
    ]
    assert dist.group.WORLD is not None
    built = {}
    for u, rows, cols in ((1, *shape) if len(shape) == 2 else shape for shape in shapes):
        name = f"{u}x{rows}x{cols}" if u > 1 else f"{rows}x{cols}"
        built[name] = Grid.from_group(dist.group.WORLD, rows=rows, cols=cols, heads=u)
    return built


def build_modes(args: argparse.Namespace, h: int, g: int, grids: dict[str, Grid]) -> list[tuple[str, Attention]]:
    """The attention functions to compare, by name; those whose heads divide."""
    found: list[tuple[str, Attention]] = []
    for mode in args.modes:
        if mode.startswith("te:"):
            comm = mode.removeprefix("te:")
            if comm != "a2a" or (h % args.ranks == 0 and g % args.ranks == 0):
                found.append((f"TE {comm}", transformer_engine(comm, h, g, args.head_dim)))
            continue
        for backend in args.backends:
            kernel = "" if backend == "auto" else f" {backend}"
            if mode == "ring":
                found.append((f"ring{kernel}", partial(ring_attention, group=dist.group.WORLD, backend=backend)))
                continue
            for shape, grid in grids.items():
                for count in (count for count in args.groups if not count or g % count == 0):
                    name = f"attention2d {shape}" + (f" G{count}" if count else "") + kernel
                    function = partial(attention2d, grid=grid, head_groups=count or None, backend=backend)
                    found.append((name, function))
    return found


def transformer_engine(comm: str, h: int, g: int, head_dim: int) -> Attention:
    """Transformer Engine's attention with its context parallelism over all ranks."""
    from transformer_engine.pytorch import DotProductAttention

    module = DotProductAttention(
        h, head_dim, num_gqa_groups=g, attention_dropout=0.0, qkv_format="sbhd", attn_mask_type="causal"
    )
    ranks = list(range(dist.get_world_size()))
    module.set_context_parallel_group(dist.group.WORLD, ranks, torch.cuda.Stream(), comm)
    return lambda q, k, v: module(q, k, v).unflatten(-1, (h, head_dim))

"""What the attention benchmarks share: ranks on GPUs or CPU, emulated nodes, and the attention functions to compare."""

from __future__ import annotations

import argparse
import os
import socket
import sys
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

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
    parser.add_argument("--nodes", action="store_true", help="pose as nodes of --ranks-per-node")
    parser.add_argument("--ranks-per-node", type=int, default=1, help="with --nodes; on GPUs of their own")
    parser.add_argument("--heads", nargs="+", default=["12/12", "16/2"], help="query/key heads")
    parser.add_argument(
        "--modes",
        nargs="+",
        default=["te:p2p", "te:all_gather", "te:a2a", "ring", "attention2d"],
        help="also te:a2a+p2p:N, all-to-all among N ranks next to each other, a ring over the rest",
    )
    parser.add_argument("--grids", nargs="*", help="RxC or UxRxC, RxC:rxc in tiles; default: all RxC of --ranks")
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
            "NCCL_HOSTID": f"node{rank // args.ranks_per_node}",
            "NCCL_SOCKET_IFNAME": "lo",
            "NCCL_NET": "Socket",
            "NCCL_MNNVL_ENABLE": "0",
        }
        if args.ranks_per_node == 1:
            os.environ |= {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1"}
    if args.device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    else:
        torch.set_num_threads(1)
    backend = "nccl" if args.device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=args.ranks)
    function(rank, args)
    dist.destroy_process_group()


class Shape(NamedTuple):
    """U x R x C and the tile that a node's ranks fill, if any, as people write them: 4x2, 2x2x2, 4x2:2x1."""

    axes: tuple[int, int, int]
    tile: tuple[int, int] | None = None

    @classmethod
    def parse(cls, text: str) -> Shape:
        """`RxC` or `UxRxC`, each with an optional `:rxc`."""
        shape, _, tile = text.partition(":")
        sizes = [int(n) for n in shape.split("x")]
        u, rows, cols = sizes if len(sizes) == 3 else (1, *sizes)
        if not tile:
            return cls((u, rows, cols))
        tile_rows, tile_cols = map(int, tile.split("x"))
        return cls((u, rows, cols), (tile_rows, tile_cols))

    def __str__(self) -> str:
        u, rows, cols = self.axes
        tile = "" if self.tile is None else f":{self.tile[0]}x{self.tile[1]}"
        return (f"{u}x" if u > 1 else "") + f"{rows}x{cols}{tile}"

    def build(self) -> Grid:
        """The caller's place in it; every rank of the world must call."""
        assert dist.group.WORLD is not None
        u, rows, cols = self.axes
        return Grid.from_group(dist.group.WORLD, rows=rows, cols=cols, heads=u, tile=self.tile)


def parse_grid(mode: str) -> tuple[Shape, int]:
    """Shape and head groups of `attention2d SHAPE`, or `attention2d SHAPE GN` in N groups."""
    _, shape, *groups = mode.split()
    return Shape.parse(shape), int(groups[0].removeprefix("G")) if groups else 1


def build_grids(args: argparse.Namespace) -> dict[str, Grid]:
    """The grids to compare, by name."""
    shapes = [Shape.parse(text) for text in args.grids or []] or [
        Shape((1, r, args.ranks // r)) for r in range(1, args.ranks + 1) if args.ranks % r == 0
    ]
    return {str(shape): shape.build() for shape in shapes}


def build_modes(args: argparse.Namespace, h: int, g: int, grids: dict[str, Grid]) -> list[tuple[str, Attention]]:
    """The attention functions to compare, by name; those whose heads divide."""
    found: list[tuple[str, Attention]] = []
    for mode in args.modes:
        if mode.startswith("te:"):
            comm = mode.removeprefix("te:")
            if not refusal(comm, args.ranks, h, g):
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


def refusal(comm: str, ranks: int, h: int, g: int) -> str | None:
    """Why Transformer Engine can't run a communication type with these heads, if it can't."""
    over_heads = a2a_ranks(comm, ranks)
    if comm.startswith("a2a+p2p") and not (1 < over_heads < ranks and ranks % over_heads == 0):
        return f"{ranks} ranks have no a2a+p2p with a2a among {over_heads}"
    if h % over_heads or g % over_heads:
        return f"{h}/{g} heads don't divide by {over_heads} ranks"
    return None


def a2a_ranks(comm: str, ranks: int) -> int:
    """Over how many ranks a communication type of Transformer Engine spreads heads."""
    kind, _, size = comm.partition(":")
    return {"a2a": ranks, "a2a+p2p": int(size or 2)}.get(kind, 1)


def transformer_engine(comm: str, h: int, g: int, head_dim: int) -> Attention:
    """Transformer Engine's attention with its context parallelism over all ranks."""
    from transformer_engine.pytorch import DotProductAttention

    module = DotProductAttention(
        h, head_dim, num_gqa_groups=g, attention_dropout=0.0, qkv_format="sbhd", attn_mask_type="causal"
    )
    ranks = list(range(dist.get_world_size()))
    kind, over_heads = comm.partition(":")[0], a2a_ranks(comm, len(ranks))
    group = hierarchical_groups(over_heads) if kind == "a2a+p2p" else dist.group.WORLD
    module.set_context_parallel_group(group, ranks, torch.cuda.Stream(), kind)
    return lambda q, k, v: module(q, k, v).unflatten(-1, (h, head_dim))


@lru_cache
def hierarchical_groups(over_heads: int) -> list[dist.ProcessGroup]:
    """What Transformer Engine's a2a+p2p takes: the group of the all-to-all, neighbours, and that of the ring."""
    world = dist.get_world_size()
    members = [list(range(i, i + over_heads)) for i in range(0, world, over_heads)]
    members += [list(range(i, world, over_heads)) for i in range(over_heads)]
    groups = [dist.new_group(ranks) for ranks in members]
    return [group for ranks, group in zip(members, groups, strict=True) if dist.get_rank() in ranks]

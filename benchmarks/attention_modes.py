"""What the attention benchmarks share: ranks on GPUs or CPU, emulated nodes, and the attention functions to compare.

A mode is written `ring`, `te:TYPE` (Transformer Engine's communication types p2p, all_gather, a2a, and a2a+p2p:N,
all-to-all among N neighbouring ranks and a ring over the rest), or `attention2d SHAPE`, behind which `GN` sets the
number of head groups and another word the kernel: `attention2d 2x2 G2 cudnn`.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from attention_kinds import Kind, Pack
from attention_timing import Attention
from hosts import posing

from megatron_attn2d import Grid, attention2d, ring_attention
from megatron_attn2d.attention.dropout import Dropout

TRANSFORMER_ENGINE = ("te:p2p", "te:all_gather", "te:a2a")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Ranks and modes."""
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count() or 2, help="context-parallel ranks")
    parser.add_argument("--nodes", action="store_true", help="pose as nodes of --ranks-per-node")
    parser.add_argument("--ranks-per-node", type=int, default=1, help="with --nodes; on GPUs of their own")
    parser.add_argument(
        "--modes",
        nargs="+",
        help="te:p2p te:all_gather te:a2a te:a2a+p2p:N ring attention2d; default: the first three and the last",
    )
    parser.add_argument("--grids", nargs="*", help="RxC or UxRxC, RxC:rxc in tiles; default: a few of --ranks")
    parser.add_argument("--groups", nargs="+", type=int, default=[1], help="head groups of attention2d")
    parser.add_argument("--backends", nargs="+", default=["auto"], help="kernels of ring and attention2d")


def add_sizes(parser: argparse.ArgumentParser, seq: int, heads: Sequence[str]) -> None:
    """Sizes of one dense causal sequence, for the tools that run nothing else."""
    parser.add_argument("--seq", type=int, default=seq, help="tokens of the sequence")
    parser.add_argument("--heads", nargs="+", default=list(heads), help="query/key heads")
    parser.add_argument("--head-dim", type=int, default=128)


def spawn(function: Callable[..., None], args: argparse.Namespace) -> None:
    """Run function(rank, args) on args.ranks processes that form one world."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(_run, (function, args, port), nprocs=args.ranks)


def _run(rank: int, function: Callable[..., None], args: argparse.Namespace, port: int) -> None:
    if args.nodes:
        os.environ |= posing(rank // args.ranks_per_node, alone=args.ranks_per_node == 1)
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
        return Grid.from_group(dist.group.WORLD, rows=rows, cols=cols, ulysses_size=u, node_block=self.tile)


class GridMode(NamedTuple):
    """`attention2d SHAPE` as a mode says it."""

    shape: Shape
    groups: int
    backend: str

    @classmethod
    def parse(cls, mode: str) -> GridMode:
        """From a mode: see the top of this file."""
        _, shape, *words = mode.split()
        groups = next((int(word[1:]) for word in words if word[0] == "G" and word[1:].isdigit()), 1)
        backend = next((word for word in words if not (word[0] == "G" and word[1:].isdigit())), "auto")
        return cls(Shape.parse(shape), groups, backend)


def default_shapes(ranks: int, h: int, g: int) -> list[Shape]:
    """One column, the squarest grid, and where the heads divide heads spread over all ranks and over two of them."""
    cols = max(c for c in range(1, ranks + 1) if ranks % c == 0 and c * c <= ranks)
    axes = [(1, ranks, 1), (1, ranks // cols, cols) if cols > 1 else (1, 1, ranks), (ranks, 1, 1), (2, ranks // 2, 1)]
    fitting = [a for a in axes if a[0] * a[1] * a[2] == ranks and not h % a[0] and not (g % a[0] and a[0] % g)]
    return [Shape(a) for a in dict.fromkeys(fitting)]


def mode_names(args: argparse.Namespace, h: int, g: int) -> Iterator[str]:
    """The modes that the command line asks for, with these heads."""
    transformer_engine_runs = args.device == "cuda"
    for mode in args.modes or [*(TRANSFORMER_ENGINE if transformer_engine_runs else ["ring"]), "attention2d"]:
        if mode.startswith("te:"):
            yield mode
            continue
        for backend in args.backends:
            kernel = "" if backend == "auto" else f" {backend}"
            if mode == "ring":
                yield f"ring{kernel}"
                continue
            for shape in [Shape.parse(text) for text in args.grids or []] or default_shapes(args.ranks, h, g):
                for count in (count for count in args.groups if g % count == 0):
                    yield f"attention2d {shape}" + (f" G{count}" if count > 1 else "") + kernel


def build_modes(args: argparse.Namespace, h: int, g: int, grids: dict[str, Grid]) -> list[tuple[str, Attention]]:
    """The attention functions of one dense causal sequence, by mode; those whose heads divide."""
    kind = Kind("dense", args.seq, h, g, head_dim=args.head_dim, value_dim=args.head_dim)
    names = [
        mode
        for mode in mode_names(args, h, g)
        if not (mode.startswith("te:") and refusal(mode.removeprefix("te:"), args.ranks, h, g))
    ]
    return [(mode, build(mode, kind, args.ranks, args.device, grids)[0]) for mode in names]


def build(
    mode: str, kind: Kind, ranks: int, device: str, grids: dict[str, Grid], packs: Sequence[Pack] = ()
) -> list[Attention]:
    """The attention functions of a mode for one kind of attention: one for each pack, or one where nothing is packed.

    Args:
        grids: those that were built already, by name; added to.

    Raises:
        ValueError: Transformer Engine can't run it with these heads.
    """
    if mode.startswith("te:"):
        comm = mode.removeprefix("te:")
        if reason := refusal(comm, ranks, kind.heads, kind.kv_heads):
            raise ValueError(reason)
        return _transformer_engine_modes(comm, kind, packs, device)
    ours = _ours(mode, kind, device, grids)
    if not packs:
        return [ours]
    return [
        partial(ours, cu_seqlens=pack.cu_seqlens, cu_seqlens_padded=pack.cu_seqlens_padded if kind.padded else None)
        for pack in packs
    ]


def _ours(mode: str, kind: Kind, device: str, grids: dict[str, Grid]) -> Attention:
    what: dict[str, Any] = {"causal": kind.causal, "window": kind.window}
    if kind.dropout:
        what["dropout"] = Dropout(kind.dropout, torch.ones(1, dtype=torch.int64, device=device))
    if mode.startswith("ring"):
        function: Attention = partial(ring_attention, group=dist.group.WORLD, backend=[*mode.split(), "auto"][1])
    else:
        asked = GridMode.parse(mode)
        name = str(asked.shape)
        grids[name] = grids.get(name) or asked.shape.build()
        function = partial(attention2d, grid=grids[name], overlap_groups=asked.groups, backend=asked.backend)

    def call(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None = None, **packed: Any) -> Tensor:
        return function(q, k, v, sink=sink, **what, **packed)

    return call


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


def transformer_engine(
    comm: str,
    h: int,
    g: int,
    head_dim: int,
    *,
    value_dim: int | None = None,
    causal: bool = True,
    window: tuple[int, int] | None = None,
    dropout: float = 0.0,
    sink: bool = False,
) -> Attention:
    """Transformer Engine's attention with its context parallelism over all ranks, sbhd as Megatron calls it.

    The function takes q, k, v, the sink where there is one, and for packs the arguments of `DotProductAttention`.
    """
    from transformer_engine.pytorch import DotProductAttention

    module = DotProductAttention(
        h,
        (head_dim, value_dim or head_dim),
        num_gqa_groups=g,
        attention_dropout=dropout,
        qkv_format="sbhd",
        attn_mask_type="causal" if causal else "no_mask",
        window_size=window,
        softmax_type="learnable" if sink else "vanilla",
    )
    ranks = list(range(dist.get_world_size()))
    kind, over_heads = comm.partition(":")[0], a2a_ranks(comm, len(ranks))
    group = hierarchical_groups(over_heads) if kind == "a2a+p2p" else dist.group.WORLD
    module.set_context_parallel_group(group, ranks, torch.cuda.Stream(), kind)

    def call(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None = None, **packed: Any) -> Tensor:
        if sink is not None:
            module.softmax_offset = sink  # a Parameter, as the module's own
        return module(q, k, v, **packed).unflatten(-1, (h, -1))

    return call


def _transformer_engine_modes(comm: str, kind: Kind, packs: Sequence[Pack], device: str) -> list[Attention]:
    function = transformer_engine(
        comm,
        kind.heads,
        kind.kv_heads,
        kind.head_dim,
        value_dim=kind.value_dim,
        causal=kind.causal,
        window=kind.window,
        dropout=kind.dropout,
        sink=kind.sink,
    )
    if not packs:
        return [function]
    longest = max(max(pack.places) for pack in packs)  # the same for all, so that cuDNN's plan of one serves the next

    def totals(numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=device)

    found: list[Attention] = []
    for pack in packs:
        lengths = totals(pack.cu_seqlens)
        places = totals(pack.cu_seqlens_padded) if kind.padded else lengths
        found.append(
            partial(
                function,
                qkv_format="thd",
                attn_mask_type="padding_causal" if kind.causal else "padding",
                cu_seqlens_q=lengths,
                cu_seqlens_kv=lengths,
                cu_seqlens_q_padded=places,
                cu_seqlens_kv_padded=places,
                max_seqlen_q=longest,
                max_seqlen_kv=longest,
                pad_between_seqs=kind.padded,
            )
        )
    return found


@lru_cache
def hierarchical_groups(over_heads: int) -> list[dist.ProcessGroup]:
    """What Transformer Engine's a2a+p2p takes: the group of the all-to-all, neighbours, and that of the ring."""
    world = dist.get_world_size()
    members = [list(range(i, i + over_heads)) for i in range(0, world, over_heads)]
    members += [list(range(i, world, over_heads)) for i in range(over_heads)]
    groups = [dist.new_group(ranks) for ranks in members]
    return [group for ranks, group in zip(members, groups, strict=True) if dist.get_rank() in ranks]

#!/usr/bin/env python3
"""Error of attention2d, our ring and Transformer Engine's context parallelism against dense float64, side by side.

    python benchmarks/benchmark_precision.py --modes te:p2p te:all_gather ring attention2d
    python benchmarks/benchmark_precision.py --device cpu --ranks 2 --seq 2048 --heads 4/4 --head-dim 64 \\
        --modes ring attention2d

Relative errors (2-norm over the whole sequence) of O, dQ, dK and dV, causal, on inputs of three kinds:
    normal        standard normal
    large         queries scaled so that logits reach about +-50
    adversarial   keys with a common offset and values with a large mean, so that sums cancel; few keys win each row
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from attention_modes import add_arguments, add_sizes, build_modes, spawn
from torch import Tensor

from megatron_attn2d import Grid

KINDS = ("normal", "large", "adversarial")


def main() -> None:
    """Start the ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    add_sizes(parser, 8192, ["12/12", "16/2"])
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    spawn(run_rank, parser.parse_args())


def run_rank(rank: int, args: argparse.Namespace) -> None:
    """All cases on one rank; rank 0 prints."""
    grids: dict[str, Grid] = {}
    chunks = torch.arange(args.seq).chunk(2 * args.ranks)
    mine = torch.cat([chunks[rank], chunks[2 * args.ranks - 1 - rank]]).to(args.device)
    for heads in args.heads:
        h, g = map(int, heads.split("/"))
        for kind in KINDS:
            whole = inputs(kind, args, h, g)
            exact = [x[mine] for x in dense(*whole)]
            for name, attention in build_modes(args, h, g, grids):
                q, k, v = (x[mine].requires_grad_() for x in whole[:3])
                out = attention(q, k, v)
                found = [out.detach(), *torch.autograd.grad(out, (q, k, v), whole[3][mine])]
                squares = torch.tensor(
                    [
                        [(a.double() - b).square().sum().item(), b.square().sum().item()]
                        for a, b in zip(found, exact, strict=True)
                    ],
                    device=args.device,
                    dtype=torch.float64,
                )
                dist.all_reduce(squares)
                if rank == 0:
                    errors = "  ".join(f"{x:.2e}" for x in (squares[:, 0] / squares[:, 1]).sqrt().tolist())
                    print(f"S={args.seq} h={heads:6s} {kind:12s} {name:32s} O dQ dK dV  {errors}", flush=True)


def inputs(kind: str, args: argparse.Namespace, h: int, g: int) -> list[Tensor]:
    """q, k, v and the output's gradient for the whole sequence, [s, 1, heads, d]."""
    generator = torch.Generator(args.device).manual_seed(0)
    shape = (args.seq, 1)
    dtype = getattr(torch, args.dtype)
    q, k, v, dout = (
        torch.randn(*shape, n, args.head_dim, generator=generator, device=args.device) for n in (h, g, g, h)
    )
    if kind == "large":
        q *= 12  # the largest of thousands of standard normal logits is about 4
    if kind == "adversarial":
        k += 2 * torch.randn(1, 1, g, args.head_dim, generator=generator, device=args.device)
        q *= 3
        v += 8
    return [x.to(dtype) for x in (q, k, v, dout)]


def dense(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> list[Tensor]:
    """Output and gradients in float64, head by head."""
    repeats = q.size(2) // k.size(2)
    outs, dqs = [], []
    dk, dv = torch.zeros_like(k, dtype=torch.float64), torch.zeros_like(v, dtype=torch.float64)
    future = torch.ones(q.size(0), q.size(0), dtype=torch.bool, device=q.device).triu(1)
    for head in range(q.size(2)):
        at = head // repeats
        leaves = [x[:, 0, i].double().requires_grad_() for x, i in ((q, head), (k, at), (v, at))]
        scores = (leaves[0] @ leaves[1].T * q.size(3) ** -0.5).masked_fill(future, -torch.inf)
        out = scores.softmax(-1) @ leaves[2]
        gradients = torch.autograd.grad(out, leaves, dout[:, 0, head].double())
        outs.append(out.detach())
        dqs.append(gradients[0])
        dk[:, 0, at] += gradients[1]
        dv[:, 0, at] += gradients[2]
    return [torch.stack(outs, 1).unsqueeze(1), torch.stack(dqs, 1).unsqueeze(1), dk, dv]


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""attention2d in a plain PyTorch model: FSDP2 over all ranks, context parallelism over a 2-D mesh. No Megatron.

    torchrun --nproc-per-node 4 examples/device_mesh.py            # CPU ranks, or GPUs where there are enough
    torchrun --nproc-per-node 4 examples/device_mesh.py --grid 1 1 # the same training without context parallelism

A small causal model learns to repeat the token of 8 positions before. Every rank holds one zigzag shard of each
sequence; gradients are averaged over all ranks by FSDP, whether these hold other sequences or other shards.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from megatron_attn2d import Grid, attention2d, zigzag

VOCABULARY, LENGTH, BACK = 32, 128, 8


class Block(nn.Module):
    """Pre-norm attention and MLP on [s/cp, b, hidden]."""

    def __init__(self, hidden: int, heads: int, grid: Grid) -> None:
        super().__init__()
        self.heads, self.grid = heads, grid
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.mlp = nn.Sequential(nn.Linear(hidden, 4 * hidden), nn.GELU(), nn.Linear(4 * hidden, hidden))

    def forward(self, x: Tensor) -> Tensor:
        """Add attention over the whole sequence, then the MLP."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3 * self.heads, -1)).chunk(3, dim=2)
        x = x + self.out(attention2d(q, k, v, self.grid).flatten(2))
        return x + self.mlp(self.norm2(x))


class Model(nn.Module):
    """Token and position embeddings, two blocks, logits."""

    def __init__(self, grid: Grid, hidden: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, hidden), nn.Embedding(LENGTH, hidden)
        self.blocks = nn.ModuleList(Block(hidden, heads, grid) for _ in range(2))
        self.head = nn.Linear(hidden, VOCABULARY)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Logits [s/cp, b, vocabulary] of tokens [s/cp, b] at positions [s/cp]."""
        x = self.tokens(tokens) + self.positions(positions)[:, None]
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def train(rows: int, cols: int, steps: int, batch: int = 16) -> list[float]:
    """Train on the world's ranks, rows x cols of them per sequence; returns the loss of each step."""
    device = "cuda" if torch.cuda.is_available() and torch.cuda.device_count() >= dist.get_world_size() else "cpu"
    context, world = rows * cols, dist.get_world_size()
    if world % context:
        raise SystemExit(
            f"--grid {rows} {cols}: a sequence takes {context} ranks, which don't divide the world's {world}"
        )
    replicas = world // context
    mesh = init_device_mesh(device, (replicas, cols, rows), mesh_dim_names=("data", "query", "key"))
    grid = Grid.from_mesh(mesh["query", "key"])
    torch.manual_seed(0)
    model = Model(grid).to(device)
    everyone = init_device_mesh(device, (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=everyone)
    fully_shard(model, mesh=everyone)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    positions = zigzag.positions(LENGTH, grid)
    losses = []
    for step in range(steps):
        sequences = torch.randint(VOCABULARY, (LENGTH, batch), generator=torch.Generator().manual_seed(step))
        sequences = sequences.chunk(replicas, dim=1)[mesh.get_local_rank("data")]
        targets = sequences.roll(BACK, 0)  # the first BACK positions have none
        logits = model(sequences[positions].to(device), positions.to(device))
        wanted = torch.where(positions[:, None] < BACK, -100, targets[positions]).to(device)
        # Shards differ in how many targets they have: a sum over the mean count keeps FSDP's average exact.
        loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum")
        loss = loss / ((LENGTH - BACK) * batch / dist.get_world_size())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / dist.get_world_size())
        if dist.get_rank() == 0 and step % 10 == 0:
            print(f"step {step:3d}  loss {losses[-1]:.4f}", flush=True)
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", nargs=2, type=int, default=[2, 2], metavar=("R", "C"))
    parser.add_argument("--steps", type=int, default=100)
    arguments = parser.parse_args()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    train(*arguments.grid, arguments.steps)
    dist.destroy_process_group()

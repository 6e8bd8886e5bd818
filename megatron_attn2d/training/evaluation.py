"""Measures a checkpoint's loss by position: forward passes of Megatron's schedule over windows of a data set."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch

from megatron_attn2d.megatron.upstream.batches import to_context_rank
from megatron_attn2d.training import chunked_loss
from megatron_attn2d.training.micro_batch import next_batch
from megatron_attn2d.training.session import run_in_megatron, set_up_model


@dataclass(frozen=True)
class Request:
    """What to evaluate on; Megatron's arguments say which model, which checkpoint and how long a context."""

    data: str
    """The data set or file, as the user named it."""
    prefix: str
    """Prefix of the data set."""
    samples: int
    """How many windows of one context each, which follow each other from the first token on."""
    edges: tuple[int, ...]
    """Positions that bound the buckets, ascending from 0 to the context."""
    output: str
    """JSON file for the result."""
    step: int
    """Step of the checkpoint."""


def main(request: Request, megatron_args: Sequence[str]) -> None:
    """Evaluate, as this rank; the last rank prints a table and writes `request.output`."""
    run_in_megatron(partial(_evaluate, request), megatron_args)


def _evaluate(request: Request, console: TextIO) -> None:
    from megatron.core import parallel_state as mpu

    args, model = set_up_model()
    sums = _bucket_sums(request, args, model)
    if mpu.is_pipeline_last_stage(ignore_virtual=True):
        torch.distributed.all_reduce(sums, group=mpu.get_context_parallel_group())
    if args.rank == args.world_size - 1:
        _deliver(summary(request, args.seq_length, sums), request.output, console)


def _deliver(result: dict[str, Any], output: str, console: TextIO) -> None:
    print(table(result), file=console, flush=True)  # before it is written: a full disk must not lose the result
    scratch = Path(f"{output}.new")
    scratch.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(scratch, output)


def _bucket_sums(request: Request, args: Any, model: list[torch.nn.Module]) -> torch.Tensor:
    """For this rank's tokens in each bucket, [2, buckets] in float64: the sum of their losses, and their number."""
    from megatron.core import parallel_state as mpu
    from megatron.core.pipeline_parallel import get_forward_backward_func

    positions = torch.arange(args.seq_length, device="cuda")[None]
    group = mpu.get_context_parallel_group()
    own = to_context_rank({"position_ids": positions}, group)["position_ids"]
    bucket = torch.bucketize(own[0], torch.tensor(request.edges[1:], device="cuda"), right=True)
    sums = torch.zeros(2, len(request.edges) - 1, dtype=torch.float64, device="cuda")

    def collect(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        values = losses.detach().flatten().double()
        sums[0].index_add_(0, bucket, values)
        sums[1].index_add_(0, bucket, torch.ones_like(values))
        return losses.sum(), torch.tensor(losses.numel(), dtype=torch.int, device="cuda"), {}

    for chunk in model:
        chunk.eval()
    iterators = [windows(Path(request.prefix), args.seq_length) for _ in model]
    with torch.no_grad():
        for _ in range(request.samples):
            get_forward_backward_func()(
                forward_step_func=partial(_forward_step, collect),
                data_iterator=iterators if len(model) > 1 else iterators[0],
                model=model,
                num_microbatches=1,
                seq_length=args.seq_length,
                micro_batch_size=1,
                forward_only=True,
            )
    return sums


def _forward_step(collect: Any, iterator: Any, model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    from megatron.core.utils import get_attr_wrapped_model
    from megatron.training import get_args

    batch, _ = next_batch(iterator, get_attr_wrapped_model(model, "vp_stage"))
    output = model(
        batch["tokens"],
        batch["position_ids"],
        batch["attention_mask"],
        labels=batch["labels"],
        **chunked_loss.of_model(get_args()),
    )
    return output, collect


def windows(prefix: Path, context: int, first: int = 0) -> Iterator[dict[str, torch.Tensor]]:
    """Yields windows of the data set, in order and without overlap, as batches [1, context] with Megatron's keys.

    The first one is the window number `first`, from 0; those before it are not read.

    Token ids and positions are int64, the loss mask is fp32.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    stream = np.memmap(f"{prefix}.bin", dtype=IndexedDataset(str(prefix)).index.dtype, mode="r")
    for begin in range(first * context, stream.size - context, context):
        tokens = torch.from_numpy(stream[begin : begin + context + 1].astype(np.int64))
        yield {
            "tokens": tokens[None, :-1],
            "labels": tokens[None, 1:].contiguous(),
            "loss_mask": torch.ones(1, context),
            "position_ids": torch.arange(context)[None],
        }


def summary(request: Request, context: int, sums: torch.Tensor) -> dict[str, Any]:
    """The result that is written and printed: losses in nats per token.

    Args:
        request: what was evaluated.
        context: tokens of a window.
        sums: of `_bucket_sums`, over all ranks.
    """
    losses, counts = sums.tolist()

    def of(loss: float, tokens: float) -> dict[str, Any]:
        return {"tokens": int(tokens), "loss": loss / tokens, "perplexity": math.exp(loss / tokens)}

    edges = request.edges
    return {
        "data": request.data,
        "step": request.step,
        "context": context,
        "samples": request.samples,
        **of(sum(losses), sum(counts)),
        "buckets": [{"from": edges[i], "to": edges[i + 1], **of(losses[i], counts[i])} for i in range(len(edges) - 1)],
    }


def table(result: dict[str, Any]) -> str:
    """`result`, of `summary`, as a table for people."""
    rows = [("positions", "tokens", "loss", "perplexity")]
    for bucket in [*result["buckets"], {"from": 0, "to": result["context"], **result}]:
        place = f"{bucket['from']:,} to {bucket['to'] - 1:,}"
        rows.append((place, f"{bucket['tokens']:,}", f"{bucket['loss']:.4f}", f"{bucket['perplexity']:.3f}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([*lines[:-1], "-" * len(lines[0]), lines[-1]])

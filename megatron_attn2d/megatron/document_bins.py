"""Documents of a sample as a fixed number of bins, which CUDA graphs take: replays find other documents in one tensor.

A graph is captured once, so that nothing of a batch may be a number of the host. The documents are a tensor of the
device, of one shape for all batches:

    bins = [[0, 7, 10, 20, 20, 20],    running totals of the documents' tokens
            [0, 8, 12, 24, 24, 24]]    and of their places; the last two bins are empty

It goes through the model in the place of the attention mask: like a mask, it says who sees whom. Megatron's graphs,
recomputation and pipeline hand on a mask as they hand on any tensor. It is copied into an input of the graph before
each replay, and micro-batches in flight share no input. PackedSeqParams, by which layers are told of packs otherwise,
is no tensor: graphs of Transformer Engine refuse it, and upstream's rotary positions read its totals back.
So the layers believe that the pack is one sequence; rotary positions are those of `at` (`upstream/rotary.py`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_attn2d.attention.packing import Packing
from megatron_attn2d.errors import UsageError

UNSERVED = {
    "multi_latent_attention": "rotates by the positions of the whole sample",
    "mtp_num_layers": "would predict a neighbour's tokens",
    "num_experts": "would balance padding too",
    "spec": "names layers that may not read them",
}
"""Arguments of Megatron's that bins are not served with, and why."""


def asked_for(args: Any) -> bool:
    """Whether a launch with Megatron's arguments `args`, or None, tells attention of documents by bins."""
    if not getattr(args, "document_multiple", 0):
        return False
    return bool(args.document_bins) or args.cuda_graph_impl != "none"


def agreed(asked: int, found: int) -> int:
    """How many bins a sample has, on every rank, all of which call; 0 is asked for where it follows from the data.

    Args:
        asked: bins, or 0.
        found: documents of the fullest sample in the data sets of this rank, 0 without one.

    Raises:
        UsageError: a sample holds more documents than were asked for.
    """
    most = torch.tensor(found, device=torch.cuda.current_device())
    dist.all_reduce(most, dist.ReduceOp.MAX)
    if 0 < asked < int(most):
        raise UsageError(
            f"data.document_bins = {asked} (--document-bins): a sample of this run holds {int(most)} documents; choose "
            f"{int(most)} or more, or null"
        )
    return asked or int(most)


def check_model(args: Any) -> None:
    """Raise UsageError for a model, by Megatron's arguments, whose layers would not read the bins."""
    for name, why in UNSERVED.items():
        if value := getattr(args, name, None):
            raise UsageError(
                f"--{name.replace('_', '-')} {value} {why} where documents are bins (--document-bins "
                f"{args.document_bins}, --cuda-graph-impl {args.cuda_graph_impl}): leave it out, or choose "
                "--document-bins 0 and --cuda-graph-impl none"
            )


def check_batch(places: Tensor, args: Any) -> None:
    """Raise UsageError if a sample of [b, n] running totals of places, which the host knows, has more than the bins."""
    if asked_for(args) and (most := int((places.diff(dim=1) > 0).sum(1).max())) > args.document_bins:
        raise UsageError(
            f"data.document_bins = {args.document_bins} (--document-bins): a sample of a batch holds {most} documents; "
            f"choose {most} or more, or null"
        )


def are_bins(mask: Tensor | None) -> bool:
    """Whether what attention gets for a mask are bins: masks are bool."""
    return mask is not None and mask.dtype == torch.int32


def of_samples(totals: Tensor, places: Tensor, count: int) -> Tensor:
    """The bins of samples that go one after the other, on their device.

    Args:
        totals: [b, n] int32, running totals of the documents' tokens of each sample, the last one repeated.
        places: [b, n], the same with padding.
        count: bins of a sample; none of them holds more documents.

    Returns:
        [2, b * count + 1] int32. Empty bins are in the middle where there are several samples.
    """
    lengths = torch.stack([_first(one, count).diff(dim=1).flatten() for one in (totals, places)])
    return torch.nn.functional.pad(lengths.cumsum(1), (1, 0)).int()


def of_one(tokens: int, count: int, device: torch.device | int) -> Tensor:
    """The bins of a single document of `tokens` tokens, [2, count + 1] int32."""
    bins = torch.full((2, count + 1), tokens, dtype=torch.int32, device=device)
    bins[:, 0] = 0
    return bins


def rows_and_positions(bins: Tensor, tokens: int, rank: int, ranks: int) -> tuple[Tensor, Tensor]:
    """The tokens of the pack that a context rank holds, and their positions in their documents, [tokens / cp] int64."""
    totals, places = rows_of(bins)
    packing = Packing.of(totals, places, tokens, ranks, bins.device, max_seqlen=tokens)
    rows = packing.positions([rank, 2 * ranks - 1 - rank])[0]
    places = places.long()
    document = torch.searchsorted(places[1:], rows, right=True)
    return rows, rows - places.index_select(0, document)


def rows_of(bins: Tensor) -> tuple[Tensor, Tensor]:
    """The two rows of the bins: the same tensors for all layers of a batch, by which attention knows it again."""
    if _latest[0] is not bins:
        totals, places = bins.unbind()
        _latest[:] = bins, (totals, places)
    rows: tuple[Tensor, Tensor] = _latest[1]
    return rows


_latest: list[Any] = [None, None]


def _first(totals: Tensor, count: int) -> Tensor:
    """[b, n] -> [b, count + 1]: the last total is repeated, so that no document goes."""
    missing = max(0, count + 1 - totals.size(1))
    return torch.cat([totals, totals[:, -1:].expand(-1, missing)], 1)[:, : count + 1]

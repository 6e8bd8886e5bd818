"""Checks of the arguments of attention functions, before any message is sent."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from numbers import Real

import torch
from torch import Tensor

from megatron_attn2d.attention.dropout import Dropout
from megatron_attn2d.attention.kernels.base import Request
from megatron_attn2d.attention.layout import CAUSAL, FULL, Band
from megatron_attn2d.attention.packing import Packing, Totals
from megatron_attn2d.attention.warn import warn


def check_shards(q: Tensor, k: Tensor, v: Tensor, across: bool = False) -> None:
    """Check shards q [s/cp, b, h, d], k [s/cp, b, g, d], v [s/cp, b, g, dv] in the zigzag layout.

    With `across`, keys may be of another sequence of any length.

    Raises:
        ValueError: naming what does not fit.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if hasattr(x, "to_local"):  # not asked by its class, whose import takes a second
            raise ValueError(f"{name} is a DTensor: pass this rank's shard, {name}.to_local()")
        if x.dim() != 4:
            raise ValueError(f"{name} must be [s/cp, b, heads, head dim], got shape {list(x.shape)}")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"q, k and v must share dtype and device: q is {q.dtype} on {q.device}, {name} {x.dtype} on {x.device}"
            )
    if not q.dtype.is_floating_point:
        raise ValueError(f"q, k and v must be floating-point, got {q.dtype}")
    if not across and q.size(0) != k.size(0) and q.shape[1:2] == k.shape[1:2]:
        raise ValueError(
            f"{q.size(0)} tokens of q and {k.size(0)} of k per rank don't fit a mask: attention across sequences is "
            "served with causal=False and without a window"
        )
    if q.size(1) != k.size(1) or k.shape[:3] != v.shape[:3] or q.size(3) != k.size(3):
        raise ValueError(
            f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)} don't fit: tokens and batch must agree, heads "
            "of k and v, and head dims of q and k"
        )
    if q.size(3) == 0 or v.size(3) == 0:
        raise ValueError(f"q {list(q.shape)} and v {list(v.shape)} must have a head dim of 1 or more")
    if k.size(2) == 0 or q.size(2) % k.size(2):
        raise ValueError(f"{q.size(2)} query heads are no multiple of {k.size(2)} key/value heads")
    for name, x in (("q", q), ("k", k)):
        if x.size(0) == 0 or x.size(0) % 2:
            nearest = [str(n) for n in (x.size(0) // 2 * 2, x.size(0) // 2 * 2 + 2) if n]
            batch_first = f"; {list(x.shape)} are read as [s/cp, b, heads, head dim]" if x.size(1) > x.size(0) else ""
            raise ValueError(
                f"a shard of {x.size(0)} tokens is no pair of zigzag chunks ({name}): the sequence length must be a "
                f"multiple of 2 * cp; the nearest shards have {' and '.join(nearest)} tokens{batch_first}"
            )


_LARGE, _TIMES = 128, 4
"""A batch or a number of heads is doubted if it is at least `_LARGE` and `_TIMES` the tokens of the whole sequence."""


def _doubt_order(q: Tensor, ranks: int) -> None:
    """Warn where q [s/cp, b, h, d] is probably in another order: [b, s, h, d] or [b, h, s, d].

    Nobody spreads a sequence over ranks that has far fewer tokens than there are sequences or heads.
    """
    tokens, (batch, heads) = q.size(0) * ranks, q.shape[1:3]
    if max(batch, heads) >= max(_LARGE, _TIMES * tokens):
        warn(
            f"q {list(q.shape)} is read as [s/cp, b, heads, head dim]: {batch} sequences of {tokens} tokens on {ranks} "
            f"ranks, {heads} heads. Are its dims in another order? transpose(0, 1) of [b, s/cp, heads, head dim] is "
            "wanted"
        )


def band_of(causal: bool, window: tuple[int | None, int | None] | None, tokens: int) -> Band:
    """Who sees whom in a sequence of `tokens` tokens. A side of the window that is -1 or None has no limit.

    Under the causal mask no token sees a later one, whatever the window's right side is.

    Raises:
        ValueError: the window is not a pair of sides.
    """
    sides = [None if side == -1 else side for side in _pair(window)]
    if len(sides) != 2 or any(side is not None and (not hasattr(side, "__index__") or side < 0) for side in sides):
        raise ValueError(
            f"window={window} is no window: choose (left, right), how many tokens before and after it a "
            "token sees, -1 for all"
        )
    left, right = (None if side is None or side >= tokens - 1 else side for side in sides)
    return Band(left, 0 if causal else right)


def _pair(window: object) -> Sequence[int | None]:
    if window is None:
        return None, None
    return window if isinstance(window, Sequence) else ()


def packed(
    cu_seqlens: Totals | None,
    cu_seqlens_padded: Totals | None,
    max_seqlen: int | None,
    shards: Sequence[Tensor],
    ranks: int,
) -> Packing | None:
    """The packed sequences of shards [t/cp, heads, d] on `ranks` ranks; None without `cu_seqlens`.

    Raises:
        ValueError: naming what does not fit.
    """
    for name, values in (("cu_seqlens", cu_seqlens), ("cu_seqlens_padded", cu_seqlens_padded)):
        if isinstance(values, Tensor):
            _check_totals(name, values, shards[0].device)
    if cu_seqlens is None:
        if cu_seqlens_padded is not None:
            raise ValueError("cu_seqlens_padded comes without cu_seqlens: pass both")
        return None
    if cu_seqlens_padded is not None and Packing.on_gpu(cu_seqlens) != Packing.on_gpu(cu_seqlens_padded):
        raise ValueError("of cu_seqlens and cu_seqlens_padded one is on a GPU: pass both there, or both to the host")
    for name, x in zip("qkv", shards, strict=True):
        if x.dim() != 3 or x.size(0) != shards[0].size(0):
            raise ValueError(
                f"{name} of packed sequences must be [t/cp, heads, head dim] with the tokens of q, got {list(x.shape)}"
            )
    tokens = shards[0].size(0) * ranks
    return Packing.of(cu_seqlens, cu_seqlens_padded, tokens, ranks, shards[0].device, max_seqlen)


def _check_totals(name: str, values: Tensor, device: torch.device) -> None:
    if values.dtype not in (torch.int32, torch.int64) or values.numel() < 2:
        raise ValueError(f"{name} must be a tensor of int32 or int64 with [0, s1, s1 + s2, ...], got {values.dtype}")
    if Packing.on_gpu(values) and values.device != device:
        raise ValueError(f"{name} is on {values.device} and q on {device}: pass it on the same device, or on the CPU")


def sequences_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: tuple[int | None, int | None] | None,
    zigzag_ranks: int,
    ulysses_size: int,
    packing: Packing | None,
) -> tuple[Packing, Band]:
    """The sequences in the zigzag of so many ranks, and who sees whom within each.

    A shard of that zigzag is made of those of `ulysses_size` ranks.

    Raises:
        ValueError: naming what does not fit.
    """
    longest = max(q.size(0), k.size(0)) * zigzag_ranks * ulysses_size
    if packing is not None:
        longest = 2 * packing.ranks * packing.longest
    band = band_of(causal, window, longest)
    check_shards(q, k, v, across=band == FULL and packing is None)
    if packing is not None:
        return packing.over(ulysses_size), band
    _doubt_order(q, zigzag_ranks * ulysses_size)
    return Packing.of_one(q.size(0) * ulysses_size // 2, zigzag_ranks, q.device), band


def request_of(q: Tensor, v: Tensor, sequences: Packing, band: Band, dropout: Dropout | None) -> Request:
    """What the call asks of a kernel."""
    windows = band not in (FULL, CAUSAL)
    return Request(
        q.device.type,
        q.dtype,
        q.size(3),
        v.size(3),
        windows=windows,
        dropout=dropout is not None,
        grouped=v.size(2) != q.size(2),
        segments=not sequences.plain or (windows and sequences.ranks > 1),
    )


def check_first_derivative() -> None:
    """Raise RuntimeError in a backward pass that is to be differentiated: its messages would be left out."""
    if torch.is_grad_enabled():
        raise RuntimeError("context-parallel attention has no second derivative: leave out create_graph=True")


def check_heads(heads: int, kv_heads: int, ulysses_size: int, overlap_groups: int = 1) -> None:
    """Raise ValueError unless heads spread over the ranks of the head axis, and key/value heads divide into groups."""
    if overlap_groups < 1 or kv_heads % overlap_groups:
        raise ValueError(f"overlap_groups={overlap_groups} does not divide the {kv_heads} key/value heads of this rank")
    if heads % ulysses_size:
        raise ValueError(f"{heads} query heads don't divide by the {ulysses_size} ranks of the grid's head axis (U)")
    if kv_heads % ulysses_size and ulysses_size % kv_heads:
        raise ValueError(
            f"{kv_heads} key/value heads neither divide by the {ulysses_size} ranks of the grid's head axis (U) nor "
            "into them"
        )


def check_scale(scale: object) -> None:
    """Raise ValueError unless the factor on the scores is a finite number: a tensor would get no gradient."""
    if not isinstance(scale, Real) or not isfinite(scale):
        raise ValueError(f"softmax_scale={scale!r} is no finite number: pass a float, or None for 1/sqrt(head dim)")


def check_sink(sink: Tensor | None, q: Tensor) -> None:
    """Raise ValueError unless there is a score for each head of q."""
    if sink is not None and not isinstance(sink, Tensor):
        raise ValueError(f"sink must be a tensor [{q.size(2)}], one score for each query head: got {sink!r}")
    if sink is not None and (sink.shape != (q.size(2),) or sink.device != q.device):
        raise ValueError(
            f"sink must be one score for each of the {q.size(2)} query heads, on {q.device}: got shape "
            f"{list(sink.shape)} on {sink.device}"
        )

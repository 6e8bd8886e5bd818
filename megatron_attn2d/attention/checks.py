"""What attention functions ask of their inputs, said before anything is sent."""

from __future__ import annotations

from torch import Tensor


def check_shards(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Check shards q [s/cp, b, h, d], k [s/cp, b, g, d], v [s/cp, b, g, dv] in the zigzag layout.

    Raises:
        ValueError: naming what does not fit.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{name} must be [s/cp, b, heads, head dim], got shape {list(x.shape)}")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"q, k and v must share dtype and device: q is {q.dtype} on {q.device}, {name} {x.dtype} on {x.device}"
            )
    if not q.dtype.is_floating_point:
        raise ValueError(f"q, k and v must be floating-point, got {q.dtype}")
    if q.shape[:2] != k.shape[:2] or k.shape[:3] != v.shape[:3] or q.size(3) != k.size(3):
        raise ValueError(
            f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)} don't fit: tokens and batch must agree, heads "
            "of k and v, and head dims of q and k"
        )
    if k.size(2) == 0 or q.size(2) % k.size(2):
        raise ValueError(f"{q.size(2)} query heads are no multiple of {k.size(2)} key/value heads")
    if q.size(0) == 0 or q.size(0) % 2:
        raise ValueError(
            f"a shard of {q.size(0)} tokens is no pair of zigzag chunks: the sequence length must be a multiple of "
            "2 * cp"
        )

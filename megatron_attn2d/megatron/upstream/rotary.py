"""Rotary angles at positions that a batch brings along: those of tokens in their own documents.

Upstream rotates packed sequences inside each layer by their lengths, which it reads from the GPU. A layer rotates one
sequence by the angles that it is given. So a pack passes as one sequence, whose angles are looked up here, once for all
layers: the same numbers, and nothing is read.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor

from megatron_attn2d.megatron.upstream.patching import Patch

KEY = "rotary_positions"
"""Key of a batch: the positions of its tokens in their documents, [b * s / cp] int64, on every pipeline stage."""
_positions: ContextVar[Tensor | None] = ContextVar(KEY, default=None)


@contextmanager
def at(positions: Tensor | None) -> Iterator[None]:
    """While entered a model's angles are those of `positions`, [t/cp] int64; None: as upstream has them."""
    token = _positions.set(positions)
    try:
        yield
    finally:
        _positions.reset(token)


def _at_given_positions(forward: Any) -> Any:
    """`forward` of rotary embeddings: angles [t/cp, 1, 1, d] of the positions given, if there are any."""

    @functools.wraps(forward)
    def angles(self: Any, max_seq_len: int, *args: Any, **kwargs: Any) -> Any:
        positions = _positions.get()
        if positions is None:
            return forward(self, max_seq_len, *args, **kwargs)
        found = forward(self, max_seq_len, packed_seq=True)  # of a whole sequence, not of this rank's chunks
        table, *factor = found if isinstance(found, tuple) else (found,)
        chosen = table.index_select(0, positions)
        return (chosen, *factor) if factor else chosen

    angles.cache_clear = forward.cache_clear  # type: ignore[attr-defined]  # which upstream calls
    return angles


_EMBEDDINGS = "megatron.core.models.common.embeddings"
_REASON = "positions begin anew in each document, and a layer in a CUDA graph can't ask where"
PATCHES = (
    Patch(f"{_EMBEDDINGS}.rotary_pos_embedding:RotaryEmbedding.forward", _at_given_positions, _REASON),
    Patch(f"{_EMBEDDINGS}.yarn_rotary_pos_embedding:YarnRotaryEmbedding.forward", _at_given_positions, _REASON),
)

"""What of its inputs a call keeps for the backward pass."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor


def without_neighbours(*tensors: Tensor) -> list[Tensor]:
    """The tensors; copies of those that are part of a storage which they do not fill together.

    With rotary positions queries and keys are new tensors, but values stay a part of what the projection of all three
    returned, as in Megatron: kept as they are they would keep all of it, with as many key heads as query heads two
    tensors of the size of Q more in every layer.
    """
    filled: Counter[int] = Counter()
    for x in tensors:
        filled[x.untyped_storage().data_ptr()] += x.nbytes
    return [x if filled[(storage := x.untyped_storage()).data_ptr()] >= storage.nbytes() else _copy(x) for x in tensors]


def _copy(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)

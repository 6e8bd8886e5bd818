"""What of its inputs a call keeps for the backward pass."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor


def without_neighbours(*tensors: Tensor) -> list[Tensor]:
    """The tensors, where autograd saves them with copies of those that fill no more than half of a storage together.

    With rotary positions queries and keys are new tensors, but values stay a part of what the projection of all three
    returned, as in Megatron: saved as they are they would keep all of it, with as many key heads as query heads two
    tensors of the size of Q more in every layer. (A norm of queries that saves its input keeps it all the same.)
    """
    if not torch.is_grad_enabled() or not any(x.requires_grad for x in tensors):
        return list(tensors)
    filled: Counter[int] = Counter()
    for x in tensors:
        filled[x.untyped_storage()._cdata] += x.nbytes

    def copied(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        few = 2 * filled[storage._cdata] <= storage.nbytes()
        return x.clone(memory_format=torch.contiguous_format) if few else x

    return [copied(x) for x in tensors]

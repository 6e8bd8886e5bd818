"""Room for keys and values: what does not fit the ranks' memory is said before it is filled in, with what would."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from megatron_attn2d.errors import UsageError
from megatron_attn2d.inference import shards
from megatron_attn2d.inference.cache import Cache
from megatron_attn2d.inference.model import Model

_MARGIN = 0.9
"""Share of the free memory that a cache may take: activations need some too."""
_GIB = 1 << 30


class Room:
    """Makes caches of a model that fit; every rank of the replica calls, and gets the same answer."""

    def __init__(self, model: Model, chunk: int, ranks: int) -> None:
        """For prompts that are filled in by chunks of `chunk` tokens per rank, on `ranks` context ranks."""
        self._model, self._chunk, self._ranks = model, chunk, ranks
        # Stages may have different layers, and all must come to the same decision: these are of the largest stage.
        self._per_token = model.largest(model.bytes_per_token)
        self._layer_per_token = model.largest(max(map(model.layer_bytes, model.layers), default=0))

    def check(self, batches: Iterable[Sequence[int]], new: int) -> None:
        """Raise UsageError unless a cache fits for each of `batches`, lengths of texts, with `new` more tokens each."""
        free = self._free()
        for lengths in batches:
            self._check(lengths, new, self._capacity(lengths, new), free)

    def cache(self, lengths: Sequence[int], new: int) -> Cache:
        """An empty cache for texts of `lengths` tokens, with `new` more of each.

        Raises:
            UsageError: it does not fit.
        """
        capacity = self._capacity(lengths, new)
        self._check(lengths, new, capacity, self._free())
        return self._model.new_cache(len(lengths), capacity)

    def make(self, cache: Cache, lengths: Sequence[int], new: int) -> None:
        """Lets `cache` grow, where it must, for `lengths` tokens that are filled in and `new` single ones after them.

        Raises:
            UsageError: what it takes to grow does not fit.
        """
        needed = self._capacity(lengths, new, cache.filled)
        if needed <= cache.capacity:
            return
        free = self._free()
        # A quarter more than there was, if it fits, for a cache that grows again and again: growing copies it.
        for capacity in (max(needed, cache.capacity * 5 // 4), needed):
            if self._growth(cache, capacity) <= free:
                cache.grow(capacity)
                return
        per_token = len(lengths) * self._per_token
        fixed = self._growth(cache, cache.capacity)
        held, wanted = max(cache.lengths), max(map(sum, zip(cache.lengths, lengths, strict=True))) + new
        most = (cache.capacity + max(0, int(free) - fixed) // per_token) * self._ranks - held
        choices = [f"{max(0, most):,} more tokens per text"]
        if per_token * needed <= free + per_token * cache.capacity:
            choices.append(f"a cache that has the room from the beginning, prefill(..., room={wanted - held:,})")
        raise UsageError(
            f"a cache of {held:,} tokens per text has to grow for {wanted - held:,} more, which takes "
            f"{self._growth(cache, needed) / _GIB:,.2f} GiB beside it on each of {self._ranks} context ranks, and "
            f"{free / _GIB:,.2f} GiB are free: choose {', or '.join(choices)}"
        )

    def _capacity(self, lengths: Sequence[int], new: int, filled: Sequence[Sequence[int]] | None = None) -> int:
        return shards.capacity(lengths, new, self._chunk * self._ranks, self._ranks, filled)

    def _growth(self, cache: Cache, capacity: int) -> int:
        """Bytes beside the cache that growing to `capacity` takes at most: a layer is kept until it is copied."""
        layer = cache.capacity * self._layer_per_token
        return len(cache.filled) * ((capacity - cache.capacity) * self._per_token + layer)

    def _free(self) -> float:
        return self._model.free_bytes() * _MARGIN

    def _check(self, lengths: Sequence[int], new: int, capacity: int, free: float) -> None:
        sequences, tokens, each = len(lengths), max(lengths) + new, capacity * self._per_token
        if sequences * each <= free:
            return
        number = "1 prompt" if sequences == 1 else f"{sequences} prompts"
        what = [f"{int(free // each)} prompts at once"] if each <= free and sequences > 1 else []
        what += [f"{tokens * free / (sequences * each):,.0f} tokens per prompt"]
        what += [f"{-(-self._ranks * sequences * each // int(free)):,} context ranks"] if free >= 1 else []
        raise UsageError(
            f"a cache of {number} of {tokens:,} tokens takes {sequences * each / _GIB:,.2f} GiB on each of "
            f"{self._ranks} context ranks, and {free / _GIB:,.2f} GiB are free: choose {', or '.join(what)}"
        )

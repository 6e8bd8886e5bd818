"""Whether a cache has room for what comes."""

from types import SimpleNamespace
from unittest.mock import Mock

import torch

from megatron_attn2d.inference.generator import Generator


def test_there_is_room_for_each_of_texts_of_unequal_length() -> None:
    """Of 12 tokens rank 0 keeps 6, of 13 five."""
    from megatron_attn2d.inference.cache import Cache
    from megatron_attn2d.inference.room import Room

    model = Mock(bytes_per_token=1, layers=[])
    model.largest.side_effect = lambda value: value
    model.free_bytes.return_value = 1000
    cache = Cache(1, 15, None, torch.device("cpu"), {})
    cache.ranks, cache.filled = 2, [[10, 3]]
    generator = SimpleNamespace(replica=0, replicas=1, _room=Room(model, 4096, 2))
    Generator._rounds(generator, [[1] * 12, [1] * 13], 0, cache, True)  # type: ignore[arg-type]
    assert cache.capacity >= 16

"""ATTENTION2D context parallelism for NVIDIA Megatron-Core."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_attn2d.attention import Grid, attention2d, ring_attention

__version__ = "0.1.0"
__all__ = ["Grid", "attention2d", "ring_attention"]


def __getattr__(name: str) -> Any:
    # torch takes seconds to import; the command line's checks don't need it.
    if name in __all__:
        return getattr(import_module("megatron_attn2d.attention"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""ATTENTION2D context parallelism for NVIDIA Megatron-Core."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_attn2d.attention import zigzag
    from megatron_attn2d.attention.attention2d import attention2d
    from megatron_attn2d.attention.grid import Grid
    from megatron_attn2d.attention.ring import ring_attention
    from megatron_attn2d.megatron.layer_spec import attention2d_layer_spec

__version__ = "0.3.0"
__all__ = ["Grid", "attention2d", "attention2d_layer_spec", "ring_attention", "zigzag"]

_HOME = {
    "Grid": "attention.grid",
    "attention2d": "attention.attention2d",
    "attention2d_layer_spec": "megatron.layer_spec",
    "ring_attention": "attention.ring",
}


def __getattr__(name: str) -> Any:
    if name == "zigzag":
        return import_module(f"{__name__}.attention.zigzag")
    # torch and Megatron take seconds to import; the command line's checks need neither.
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Generation and long-context evaluation of a run's checkpoint on context-parallel ranks."""

from __future__ import annotations

from typing import Any

__all__ = ["Completion", "Generator", "Sampling"]


def __getattr__(name: str) -> Any:
    if name in __all__:  # imports torch and Megatron, of which importing a package should know nothing
        from megatron_attn2d.inference import generator

        return getattr(generator, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""A deprecated name for `megatron_attn2d.megatron.upstream.compat`."""

import warnings

from megatron_attn2d.megatron.upstream.compat import applied_fixes

__all__ = ["applied_fixes"]

warnings.warn(
    "megatron_attn2d.megatron.compat is now megatron_attn2d.megatron.upstream.compat", DeprecationWarning, stacklevel=2
)

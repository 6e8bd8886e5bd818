"""The algorithm. Knows torch.distributed and attention kernels, nothing of Megatron."""

from megatron_attn2d.attention.attention2d import attention2d
from megatron_attn2d.attention.grid import Grid
from megatron_attn2d.attention.ring import ring_attention

__all__ = ["Grid", "attention2d", "ring_attention"]

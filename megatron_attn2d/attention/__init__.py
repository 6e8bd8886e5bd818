"""The algorithm. Knows torch.distributed and attention kernels, nothing of Megatron.

The public names are those of `megatron_attn2d`. Nothing is imported here: `layout` and `overlap` need no torch, and the
planner and the command line's checks use them.
"""

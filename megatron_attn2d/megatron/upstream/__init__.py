"""Narrow seams into Megatron-Core: patches with their reasons, the seam for CPU ranks, quiet imports."""

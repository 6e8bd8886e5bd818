"""Stops a training that would silently go wrong: different ranks, wrong attention, NaN, damaged files."""

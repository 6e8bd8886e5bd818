"""Trains and evaluates a run with Megatron-Core's own loop: providers, and what is shown and recorded."""

"""A small run that the tests of the configuration change, and how they change it."""

import re

from hypothesis import HealthCheck, settings

from megatron_attn2d.config import load_run, megatron_arguments

# 8 CPU ranks: 2 pipeline stages x 4 context ranks.
BASE = """
model: {num_layers: 4, hidden_size: 128, num_attention_heads: 4}
parallelism: {pipeline: 2}
context_parallel: {size: 4}
data: {vocab_size: 512, null_tokenizer_eod_id: 256}
optimizer: {lr: 1e-3}
training: {train_iters: 60, seq_length: 256, global_batch_size: 4, precision: fp32}
environment: {device: cpu}
"""
ROPE = "model.position_embedding_type=rope"
FULL = "training.recompute_granularity=full training.recompute_method=uniform training.recompute_num_layers=1"

unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def split_overrides(text):
    """'a=1 b=[2, 3]' -> ['a=1', 'b=[2, 3]']"""
    return re.split(r" (?=[a-z0-9_.]+\+?=)", text)


def arguments(path, *overrides):
    """Megatron's arguments of a run as one text, each followed by a blank."""
    return " ".join(megatron_arguments(load_run(path, overrides))) + " "


def write_checkpoint(run_dir, step):
    """What a complete checkpoint leaves in a run's directory, but for its content."""
    folder = run_dir / "checkpoints" / f"iter_{step:07d}"
    folder.mkdir(parents=True)
    for name in (".metadata", "metadata.json"):
        (folder / name).touch()
    (folder.parent / "latest_checkpointed_iteration.txt").write_text(str(step))

"""The files in configs/, taken through upstream's own validation."""

import json
import os
import subprocess
import sys
from math import prod
from pathlib import Path

import pytest

from megatron_attn2d.config import load_run
from megatron_attn2d.preview.memory import estimate

ROOT = Path(__file__).parents[2]
RUNS = sorted((ROOT / "configs" / "runs").glob("*.yaml"))

# Upstream's validation needs CUDA and a world of the right size: both are pretended, in a process of its own.
VALIDATE = """
import contextlib, io, json, os, sys
from argparse import Namespace
from unittest import mock
from megatron_attn2d.config import load_run, megatron_arguments
from megatron_attn2d.megatron.upstream import compat, cpu
from megatron_attn2d.training import derive
found, held = {}, {}
with compat.applied_fixes(), cpu.seam(), contextlib.redirect_stdout(io.StringIO()):
    from megatron.core.tokenizers.utils.build_tokenizer import vocab_size_with_padding
    from megatron.training.theoretical_memory_usage import compute_weight_and_optimizer_memory
    from megatron.training import argument_utils
    from megatron.training.arguments import parse_args, validate_args
    from megatron_attn2d.training.own_arguments import add_own_arguments
    # Help texts, for which upstream reads its own sources at every parsing.
    argument_utils.ArgumentGroupFactory._get_field_docstrings = lambda *given: {}
    for path in sys.argv[1:]:
        for mode in ("attention2d", "ring"):
            # FP8 needs Transformer Engine, which is not installed here.
            run = load_run(path, [f"context_parallel.mode={mode}", "run.dir=/nowhere", "training.fp8=none"])
            os.environ.update(RANK="0", WORLD_SIZE=str(run.world_size))
            arguments = derive.with_derived_arguments(megatron_arguments(run))
            with mock.patch.object(sys, "argv", ["pretrain_gpt", *arguments]):
                args = parse_args(add_own_arguments)
                validate_args(args)
            padded = vocab_size_with_padding(run.data.vocab_size, args, logging_enabled=False)
            unsharded = Namespace(**vars(args) | {"use_distributed_optimizer": False, "padded_vocab_size": padded})
            unsharded.num_layers = run.model.num_layers  # counted as a GPT's
            held[run.run.name] = compute_weight_and_optimizer_memory(unsharded) / 18  # bytes a weight
            found[f"{run.run.name} {mode}"] = [
                args.data_parallel_size, args.context_parallel_size, args.cp_comm_type,
                args.hierarchical_context_parallel_sizes, args.seq_length, str(args.params_dtype),
            ]
print(json.dumps([found, held]))
"""


@pytest.fixture(scope="module")
def validated():
    environ = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    command = [sys.executable, "-c", VALIDATE, *map(str, RUNS)]
    environ |= {"CUDA_VISIBLE_DEVICES": "", "CUDA_DEVICE_MAX_CONNECTIONS": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environ)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])  # upstream greets first


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_our_count_of_weights_is_upstreams(validated, path):
    run = load_run(path)
    memory = estimate(run)
    # Upstream leaves out the biases of the linear layers, and keeps norms whole on every tensor rank.
    assert memory.gradients / 4 == pytest.approx(validated[1][path.stem], rel=3e-3)


def test_upstream_accepts_every_run_in_both_modes(validated):
    assert set(validated[0]) == {f"{path.stem} {mode}" for path in RUNS for mode in ("attention2d", "ring")}


@pytest.mark.parametrize(
    ("run", "replicas", "context", "length"),
    [
        ("gpt3_175b_32k", 1, 16, 32768),
        ("gpt3_13b_1m", 1, 16, 1048576),
        ("gpt3_2.7b_16gpus", 1, 16, 32768),
        ("gpt3_760m_64gpus", 1, 64, 32768),
        ("llama_8b_128k", 2, 16, 131072),
    ],
)
def test_what_upstream_makes_of_the_runs(validated, run, replicas, context, length):
    *rest, grid, dtype = [validated[0][f"{run} attention2d"][i] for i in (0, 1, 2, 4, 3, 5)]
    assert rest == [replicas, context, ["attention2d"], length]
    assert (prod(grid), dtype) == (context, "torch.bfloat16")
    assert validated[0][f"{run} ring"] == [replicas, context, ["p2p"], None, length, "torch.bfloat16"]

"""Writes a run as one command for Megatron-LM's own script."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence

from megatron_attn2d.config import RunConfig, upstream_flags
from megatron_attn2d.config.layer_pattern import is_hybrid
from megatron_attn2d.training.derive import Installed, derived_arguments

_GPT = "pretrain_gpt.py", ("megatron_attn2d.megatron.layer_spec", "attention2d_layer_spec")
_HYBRID = "pretrain_hybrid.py", ("megatron_attn2d.megatron.hybrid_spec", "attention2d_hybrid_stack_spec")
_CLUSTER = Installed(
    cuda=True, transformer_engine=True, apex=True, gradient_accumulation_kernel=True, softmax_kernels=True
)
"""The packages of an image for Megatron-LM."""


def stock_launch(run: RunConfig, arguments: Sequence[str]) -> str:
    """The command, which each node runs, or the reason why there is none.

    Args:
        run: the run.
        arguments: Megatron's and this package's, of `megatron_arguments`.
    """
    if run.environment.device == "cpu":
        return "none: Megatron-LM needs GPUs (environment.device=cuda)"
    if run.document_multiple:
        key = "data.format = sft" if run.data.format == "sft" else "data.document_masking"
        return f"none: Megatron-LM's scripts do not train with {key}"
    known = upstream_flags.options()
    words = [_with_grid(one, run) for one in _by_flag(arguments) if one[0] != "--hierarchical-context-parallel-sizes"]
    given = [one for one in words if one[0] in known]
    for derived in derived_arguments([word for one in given for word in one], _CLUSTER):
        given.append([derived.flag, *([] if derived.value is None else [derived.value])])
    script, spec = _HYBRID if is_hybrid(run) else _GPT
    ours = [one[0] for one in words if one[0] not in known]
    note = f"# left out, as megatron-attn2d train alone has them: {' '.join(ours)}\n"
    return note + " \\\n  ".join(map(shlex.join, [*_launcher(run), [script], ["--spec", *spec], *given]))


def _with_grid(words: list[str], run: RunConfig) -> list[str]:
    """A flag and its values, with the grid in the values of --cp-comm-type, so that Megatron needs no hcp groups."""
    if words[0] != "--cp-comm-type" or run.context_parallel.mode != "attention2d" or run.context_parallel.size == 1:
        return words
    (heads, rows, columns), tile = run.grid, run.tile
    shape = f"{heads}x" * (heads > 1) + f"{rows}x{columns}" + f"/{tile[0]}x{tile[1]}" * (tile != (rows, 1))
    return [f"{word}:{shape}" if word == "attention2d" else word for word in words]


def _launcher(run: RunConfig) -> list[list[str]]:
    where = run.environment
    nodes = where.nodes or 1
    variables = {name: str(value) for name, value in where.variables.items()}
    if run.parallelism.tensor > 1 or run.context_parallel.size > 1:
        variables.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    launcher = ["torchrun", "--nproc-per-node", str(where.gpus_per_node or run.world_size // nodes)]
    if nodes > 1:
        launcher += ["--nnodes", str(nodes), "--rdzv-backend", "c10d", "--rdzv-endpoint", "HOST_OF_NODE_0:29500"]
    words = [f"{name}={value}" for name, value in variables.items()]
    return [["env", *words], launcher] if words else [launcher]


def _by_flag(arguments: Sequence[str]) -> Iterator[list[str]]:
    """Yields each flag with its values."""
    words: list[str] = []
    for word in arguments:
        if word.startswith("--") and words:
            yield words
            words = []
        words.append(word)
    yield words

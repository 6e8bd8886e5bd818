"""Runs of a tiny GPT through `pretrain_gpt.main` in the ranks of a pool, and what the tests look at afterwards."""

from __future__ import annotations

import functools
import json
import os
import signal
from pathlib import Path
from typing import Any
from unittest import mock

from tests.pool import RankPool

Tensors = dict[str, Any]

OPTIONS: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "group_query_attention": True,
    "num_query_groups": 2,
    "seq_length": 64,
    "max_position_embeddings": 64,
    "position_embedding_type": "rope",
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "micro_batch_size": 2,
    "global_batch_size": 4,
    "train_iters": 11,
    "lr": 1e-3,
    "lr_decay_style": "constant",
    "tokenizer_type": "NullTokenizer",
    "vocab_size": 512,
    "null_tokenizer_eod_id": 256,
    "split": "1,0,0",
    "eval_iters": 0,
    "eval_interval": 1000,
    "save_interval": 1000,
    "log_interval": 1,
}


def arguments(**options: Any) -> list[str]:
    """Megatron's arguments for the tiny GPT; `options` replace or, with None, remove its own."""
    args = []
    for name, value in {**OPTIONS, **options}.items():
        if value is None or value is False:
            continue
        args.append(f"--{name.replace('_', '-')}")
        if value is not True:
            args += map(str, value if isinstance(value, list | tuple) else [value])
    return args


def train(pool: RankPool, nranks: int, run_dir: Path, **options: Any) -> list[dict[str, Any]]:
    """Trains on `nranks`; returns the recorded steps of `run_dir`."""
    pool.run(train_rank, nranks, arguments(run_dir=run_dir, **options))
    return metrics(run_dir)


def train_states(
    pool: RankPool, nranks: int, run_dir: Path, sigterm_at: int | None = None, **options: Any
) -> list[Tensors]:
    """Trains on `nranks`; returns each rank's parameters, optimizer states and random states at the end.

    With `sigterm_at` the last rank gets a SIGTERM during that step.
    """
    return pool.run(_train_states, nranks, arguments(run_dir=run_dir, **options), sigterm_at)


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The recorded steps of a run."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def context_parallel(mode: str, rows: int, cols: int) -> dict[str, Any]:
    """The options of a mode of context parallelism over rows x cols ranks."""
    options: dict[str, Any] = {"context_parallel_size": rows * cols, "cp_comm_type": mode}
    if mode == "attention2d":
        options["hierarchical_context_parallel_sizes"] = [rows, cols]
    return options


def train_rank(rank: int, args: list[str]) -> None:
    """Trains as one rank of a pool."""
    from megatron.training import argument_utils
    from megatron.training import arguments as upstreams

    from megatron_attn2d.training import pretrain_gpt

    with (
        # Help texts, for which upstream reads its own sources at every parsing: half a second per rank.
        mock.patch.object(argument_utils.ArgumentGroupFactory, "_get_field_docstrings", return_value={}),
        # 900 lines in the log of each training.
        mock.patch.object(upstreams, "_print_args"),
    ):
        pretrain_gpt.main(args)


def _train_states(rank: int, args: list[str], sigterm_at: int | None) -> Tensors:
    import torch
    from megatron.training import training

    states: Tensors = {}

    def train(original: Any, step: Any, model: Any, optimizer: Any, *rest: Any, **kwargs: Any) -> Any:
        try:
            return original(step, model, optimizer, *rest, **kwargs)
        finally:
            for chunk, module in enumerate(model):
                states.update({f"{chunk}.{name}": p.detach().clone() for name, p in module.named_parameters()})
            for i, one in enumerate(optimizer.chained_optimizers):
                for j, state in enumerate(one.optimizer.state.values()):
                    states.update({f"optimizer.{i}.{j}.{key}": value.clone() for key, value in state.items()})
            states["random"] = torch.get_rng_state()

    def train_step(original: Any, *rest: Any, iteration: int, **kwargs: Any) -> Any:
        if sigterm_at is not None and iteration + 1 == sigterm_at and rank == torch.distributed.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*rest, iteration=iteration, **kwargs)

    with (
        mock.patch.object(training, "train", functools.partial(train, training.train)),
        mock.patch.object(training, "train_step", functools.partial(train_step, training.train_step)),
    ):
        train_rank(rank, args)
    return states

"""A run's configuration as `generate` needs it: the model and its layout, without what is about training."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_attn2d.config import RunConfig, load_run, megatron_arguments
from megatron_attn2d.config.forward_only import FORWARD_ONLY, accepted, on_another_grid, trained_run
from megatron_attn2d.config.loading import read_run
from megatron_attn2d.config.read import build_run
from megatron_attn2d.data.matching import check_data
from megatron_attn2d.errors import ConfigError

_FREE = ("parallelism.data", "training.global_batch_size")
_DECIDED = (
    *(one for one in FORWARD_ONLY if one.partition("=")[0] not in _FREE),
    "parallelism.sequence_parallel=false",  # a step may have fewer tokens than there are tensor ranks
    "context_parallel.mode=attention2d",
    "context_parallel.layer_modes=null",
    "training.fp8=none",
    "megatron_args.mtp_num_layers=null",
)


def configuration(run_dir: Path, overrides: list[str], world_size: int | None = None) -> RunConfig:
    """The run in `run_dir` as text is generated from its checkpoint.

    Args:
        run_dir: of the run, with its config.yaml.
        overrides: `key.sub=value`, of the layout of ranks and of the device: parallelism.*, context_parallel.*.
        world_size: ranks that a launcher has started; None when nothing runs yet.

    Raises:
        ConfigError: there is none, or overrides change what the weights depend on or what `generate` decides.
    """
    path, trained = trained_run(run_dir)
    decided = [*_DECIDED, *on_another_grid(overrides), f"run.dir={json.dumps(str(run_dir))}"]
    asked = build_run(read_run(path, [*decided, *overrides]))
    replicas = asked.parallelism.data or 1
    if world_size and not any(override.startswith("parallelism.data=") for override in overrides):
        replicas = max(1, world_size // asked.model_ranks)
    positions = trained.model.max_position_embeddings or trained.training.seq_length
    if replicas > 1 and asked.parallelism.expert > 1:
        raise ConfigError(
            "parallelism.data",
            replicas,
            "replicas complete prompts of their own, and ranks that share experts must all compute at once",
            "choose 1, or parallelism.expert=1",
        )
    parts = 2 * asked.context_parallel.size
    decided += [
        f"training.global_batch_size={replicas}",
        f"parallelism.data={replicas}",
        f"training.seq_length={max(1, trained.training.seq_length // parts) * parts}",
        f"model.max_position_embeddings={positions}",
    ]
    reasons = {
        "run.dir": f"text is generated from the checkpoint of {run_dir}",
        "training.seq_length": "a text is as long as its prompt and --max-tokens make it",
        "model.max_position_embeddings": "the run has learned so many, and rotary ones have no end",
        "context_parallel.mode": "the cache is attended on a grid, whatever mode trained",
    }
    loaded = accepted(path, trained, decided, overrides, reasons, "generate", _FREE)
    run = load_run(path, loaded, world_size=world_size)
    if run.data.tokenizer_model != trained.data.tokenizer_model:
        check_data(run, trains=False)  # which tells another tokenizer from a file that has only moved
    return run


def arguments(run: RunConfig, step: int | None) -> list[str]:
    """Megatron's arguments for `run`; with a step those that load its checkpoint, else weights are random."""
    common = [*megatron_arguments(run), "--skip-train", "--no-load-optim", "--no-load-rng"]
    if run.environment.device == "cuda":
        common.append("--no-rope-fusion")  # the fused kernel takes positions 0, 1, 2, ... for granted
    return common if step is None else [*common, "--exit-on-missing-checkpoint", "--ckpt-step", str(step)]

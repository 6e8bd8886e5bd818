"""What the ranks of `test_bridge.py` do with Megatron-Bridge, which only their functions import."""

from __future__ import annotations

import multiprocessing
import runpy
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from tests.gpu import ranks
from tests.megatron.runs import _train_states

EXAMPLE = Path(__file__).parents[2] / "examples" / "bridge_long_context.py"
LENGTH = 512
STEPS = 4
LLAMA: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": LENGTH,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.1,  # attention that picks tokens: with the usual 0.02 it would average them all
}

Result = dict[str, Any]
Options = dict[str, Any]


def tokens() -> Tensor:
    """A sequence and the token after it, [1, LENGTH + 1]."""
    return torch.randint(LLAMA["vocab_size"], (1, LENGTH + 1), generator=torch.Generator().manual_seed(2))


def start() -> None:
    """A world over NCCL; functions that upstream compiles run as they are written, which saves the compiling."""
    torch.compiler.set_stance("force_eager")
    ranks.start()


def forget_groups() -> None:
    """Also those that upstream keeps."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    parallel_state._HIERARCHICAL_CONTEXT_PARALLEL_GROUPS = None


def provider_of(path: Path, mode: str | None, grid: list[int] | None, load_weights: bool = True) -> tuple[Any, Any]:
    """Bridge's own object for a model of Hugging Face's, and the provider that it makes of it, told how to attend."""
    from megatron.bridge import AutoBridge

    from megatron_attn2d.megatron.layer_spec import attention2d_layer_spec

    bridge = AutoBridge.from_hf_pretrained(path, dtype=torch.bfloat16)
    provider = bridge.to_megatron_provider(load_weights)
    provider.gradient_accumulation_fusion = False  # gradients are read as autograd leaves them
    provider.context_parallel_size = dist.get_world_size()
    if mode is not None:
        provider.cp_comm_type = mode
    if mode == "attention2d":
        provider.transformer_layer_spec = attention2d_layer_spec
        provider.hierarchical_context_parallel_sizes = grid
    return bridge, provider


def run(rank: int, path: Path, mode: str | None = None, grid: list[int] | None = None) -> Result:
    """Logits by position; gradients, parameters, exported weights by name; names in a checkpoint; attention kinds."""
    from megatron.core import parallel_state
    from megatron.core.utils import get_batch_on_this_cp_rank

    start()
    bridge, provider = provider_of(path, mode, grid)
    provider.finalize()
    provider.initialize_model_parallel(seed=1, hierarchical_context_parallel_sizes=grid)
    try:
        [model] = provider.provide_distributed_model(wrap_with_ddp=False)
        group = parallel_state.get_context_parallel_group()
        whole = tokens().cuda()
        batch = {"tokens": whole[:, :-1], "labels": whole[:, 1:], "position_ids": torch.arange(LENGTH).cuda()[None]}
        batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=group)
        logits = model(batch["tokens"], batch["position_ids"], None)
        loss = functional.cross_entropy(logits[0].float(), batch["labels"][0], reduction="sum") / LENGTH
        loss.backward()
        parameters = {name.removeprefix("module."): p for name, p in model.named_parameters()}
        gradients = {name: parameter.grad.float() for name, parameter in parameters.items()}
        for gradient in gradients.values():
            dist.all_reduce(gradient, group=group)
        exported = bridge.export_hf_weights([model], show_progress=False)
        replicas = parallel_state.get_data_parallel_group(with_context_parallel=True)
        return {
            "logits": dict(zip(batch["position_ids"][0].tolist(), logits[0].detach().float().cpu(), strict=True)),
            "gradients": {name: gradient.cpu() for name, gradient in gradients.items()},
            "parameters": {name: parameter.detach().cpu() for name, parameter in parameters.items()},
            "exported": {name: weight.cpu() for name, weight in exported},
            "saved": sorted(model.module.sharded_state_dict(metadata={"dp_cp_group": replicas})),
            "kinds": sorted({type(m).__name__ for n, m in model.named_modules() if n.endswith("core_attention")}),
        }
    finally:
        forget_groups()


def pretrain(
    rank: int, path: Path, changes: Options, mode: str | None = None, grid: list[int] | None = None
) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step of Bridge's own training loop; a changed model starts from random weights."""
    from megatron.bridge.training import config, initialize
    from megatron.bridge.training.callbacks import Callback
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.pretrain import pretrain
    from megatron.core.distributed import DistributedDataParallelConfig

    steps: list[tuple[float, float]] = []

    class Keep(Callback):
        def on_train_step_end(self, context: Any) -> None:
            steps.append((context.loss_dict["lm loss"].item(), float(context.grad_norm)))

    start()
    _, provider = provider_of(path, mode, grid, load_weights=not changes)
    for name, value in {"seq_length": LENGTH, **changes}.items():
        setattr(provider, name, value)
    settings = config.ConfigContainer(
        model=provider,
        train=config.TrainingConfig(train_iters=STEPS, global_batch_size=2, micro_batch_size=1),
        validation=config.ValidationConfig(eval_interval=STEPS + 1, eval_iters=0),
        optimizer=config.OptimizerConfig(
            optimizer="adam", lr=1e-3, min_lr=1e-3, use_distributed_optimizer=True, bf16=True
        ),
        scheduler=config.SchedulerConfig(
            lr_decay_style="constant",
            lr_warmup_iters=0,
            lr_decay_iters=STEPS,
            start_weight_decay=0.0,
            end_weight_decay=0.0,
        ),
        ddp=DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True),
        dataset=config.GPTDatasetConfig(
            seq_length=LENGTH,
            random_seed=1,
            reset_attention_mask=False,
            reset_position_ids=False,
            eod_mask_loss=False,
            dataloader_type="single",
            num_workers=0,
        ),
        logger=config.LoggerConfig(log_interval=1),
        tokenizer=config.TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=LLAMA["vocab_size"] - 1),
        checkpoint=config.CheckpointConfig(),
        rng=config.RNGConfig(seed=1),
        dist=config.DistributedInitConfig(),
        mixed_precision="bf16_mixed",
    )
    try:
        # The wheel of Megatron-Core has its helpers compiled, and no Makefile to do it again.
        with mock.patch.object(initialize, "compile_helpers"):
            pretrain(settings, forward_step, callbacks=[Keep()])
    finally:
        initialize.destroy_global_state()
        forget_groups()
    return steps


def example(rank: int, path: Path, out: Path) -> None:
    """Runs examples/bridge_long_context.py as one rank."""
    from megatron.bridge.training import initialize

    start()
    main = runpy.run_path(str(EXAMPLE))["main"]
    given = ["--length", LENGTH, "--steps", STEPS, "--batch", 2, "--lr", 1e-3, "--rotary-base", 50000, "--grid", "2x1"]
    try:
        with mock.patch.object(initialize, "compile_helpers"):
            main([str(word) for word in (path, out, *given)])
    finally:
        initialize.destroy_global_state()
        forget_groups()


def train(rank: int, args: list[str]) -> dict[str, Tensor]:
    """The parameters after a training of ours."""
    from megatron.core.rerun_state_machine import destroy_rerun_state_machine

    allow_children()
    torch.compiler.set_stance("force_eager")
    destroy_rerun_state_machine()  # Bridge's conversions leave theirs
    states = _train_states(rank, args, None)
    return {name.split("module.")[-1]: value.cpu() for name, value in states.items() if name.startswith("0.")}


def allow_children() -> None:
    """Upstream's checkpoint writer may start a process, which the pool's daemons may not."""
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]


def to_hugging_face(rank: int, checkpoint: Path, path: Path) -> dict[str, Tensor]:
    """Converts a checkpoint of Megatron-LM's format as Bridge does; returns the parameters that it read."""
    from megatron.bridge import AutoBridge
    from megatron.bridge.training.model_load_save import load_megatron_model, temporary_distributed_context
    from transformers import LlamaConfig

    ranks.take_gpu()
    with temporary_distributed_context(backend="nccl"):
        [model] = load_megatron_model(str(checkpoint), model_type="gpt")
        config = LlamaConfig(**LLAMA, architectures=["LlamaForCausalLM"], dtype="bfloat16")
        AutoBridge.from_hf_config(config).save_hf_pretrained([model], path, show_progress=False)
        return {name.removeprefix("module."): p.detach().cpu() for name, p in model.named_parameters()}


def from_hugging_face(rank: int, path: Path, checkpoint: Path) -> None:
    """Converts the other way, into a checkpoint of Bridge's."""
    allow_children()
    start()
    bridge, provider = provider_of(path, None, None)
    provider.finalize()
    provider.initialize_model_parallel(seed=1)
    try:
        bridge.save_megatron_model(provider.provide_distributed_model(wrap_with_ddp=False), checkpoint)
    finally:
        forget_groups()


def decentralised(rank: int, path: Path, grid: list[int] | None) -> str:
    """The grid of a model on decentralised groups, or what is said to it."""
    from megatron.bridge.training.config import DistributedInitConfig, RNGConfig
    from megatron.bridge.training.initialize import torch_dist_init
    from megatron.core.parallel_state import destroy_global_memory_buffer

    from megatron_attn2d.training.guards.self_check import attentions

    start()
    _, provider = provider_of(path, "attention2d", grid)
    provider.finalize()
    initialize = partial(
        torch_dist_init,
        provider,
        DistributedInitConfig(use_decentralized_pg=True),
        RNGConfig(),
        micro_batch_size=1,
        num_distributed_optimizer_instances=1,
        get_embedding_ranks=None,
        get_position_embedding_ranks=None,
        skip_mpu_initialization=False,
    )
    try:
        [model] = provider.provide_distributed_model(wrap_with_ddp=False, pg_collection=initialize())
    except NotImplementedError as refusal:
        return str(refusal)
    finally:
        destroy_global_memory_buffer()
    grids = {attention.grid for attention in attentions([model])}
    return " ".join(f"{grid.rows}x{grid.cols}" for grid in grids)

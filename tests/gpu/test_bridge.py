"""Megatron-Bridge itself, its model provider with our layer spec: on two GPUs, in bf16, with Transformer Engine's layers.

    pip install megatron-bridge
    pytest -m gpu tests/gpu/test_bridge.py

A tiny Llama with random weights is written by Hugging Face's own classes and read by `AutoBridge`. Logits and gradients
are compared with those of Bridge's default layers on one GPU and of its ring on two, logits with Hugging Face's model.
"""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from tests.gpu.test_combinations import train_with_children
from tests.megatron.runs import arguments, context_parallel
from tests.pool import RankPool


def installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of what it lies in
        return False


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
    pytest.mark.skipif(not installed("megatron.bridge"), reason="needs megatron-bridge"),
]

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
BOUND = 3e-2
"""On the difference over the reference, in the Euclidean norm: two runs in bf16 round differently."""

Result = dict[str, Any]


def tokens() -> Tensor:
    return torch.randint(LLAMA["vocab_size"], (1, LENGTH + 1), generator=torch.Generator().manual_seed(2))


def difference(found: Tensor, reference: Tensor) -> float:
    return ((found.float() - reference.float()).norm() / reference.float().norm()).item()


def start(rank: int) -> None:
    """A world over NCCL; functions that upstream compiles run as they are written, which saves the compiling."""
    torch.compiler.set_stance("force_eager")
    torch.cuda.empty_cache()
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl")


def provider_of(path: Path, grid: list[int] | None, mode: str | None) -> tuple[Any, Any]:
    """Bridge's own object for a model of Hugging Face's, and the provider that it makes of it, told how to attend."""
    from megatron.bridge import AutoBridge

    from megatron_attn2d.megatron.layer_spec import attention2d_layer_spec

    bridge = AutoBridge.from_hf_pretrained(path, dtype=torch.bfloat16)
    provider = bridge.to_megatron_provider()
    provider.gradient_accumulation_fusion = False  # gradients are read as autograd leaves them
    provider.context_parallel_size = dist.get_world_size()
    if mode is not None:
        provider.cp_comm_type = mode
    if mode == "attention2d":
        provider.transformer_layer_spec = attention2d_layer_spec
        provider.hierarchical_context_parallel_sizes = grid
    return bridge, provider


def run(rank: int, path: Path, mode: str | None = None, grid: list[int] | None = None) -> Result:
    """Logits by position, gradients and parameters by name, the weights as Bridge exports them, the attention's kind."""
    from megatron.core import parallel_state
    from megatron.core.utils import get_batch_on_this_cp_rank

    start(rank)
    bridge, provider = provider_of(path, grid, mode)
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
        gradients = {}
        for name, parameter in model.named_parameters():
            gradient = parameter.grad.float()
            dist.all_reduce(gradient, group=group)
            gradients[name.removeprefix("module.")] = gradient.cpu()
        exported = {name: weight.cpu() for name, weight in bridge.export_hf_weights([model], show_progress=False)}
        return {
            "logits": dict(zip(batch["position_ids"][0].tolist(), logits[0].detach().float().cpu(), strict=True)),
            "gradients": gradients,
            "parameters": {n.removeprefix("module."): p.detach().cpu() for n, p in model.named_parameters()},
            "exported": exported,
            "kinds": sorted({type(m).__name__ for n, m in model.named_modules() if n.endswith("core_attention")}),
        }
    finally:
        parallel_state.destroy_model_parallel()
        parallel_state._HIERARCHICAL_CONTEXT_PARALLEL_GROUPS = None  # upstream keeps them


def assembled(parts: list[Result]) -> Tensor:
    """The logits of all positions, [LENGTH, vocabulary]."""
    logits = {position: row for part in parts for position, row in part["logits"].items()}
    return torch.stack([logits[position] for position in range(LENGTH)])


def hugging_face(path: Path) -> tuple[Tensor, dict[str, Tensor]]:
    """The logits of Hugging Face's own model in fp32, and its weights as they are stored."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    weights = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
    with torch.no_grad():
        return model.float()(tokens()[:, :-1]).logits[0], weights


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("llama")
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig(**LLAMA)).to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def default(pool: RankPool, llama: Path) -> dict[int, list[Result]]:
    """Bridge's default layers on one GPU and, as a ring, on two."""
    return {1: pool.run(run, 1, llama, init_group=False), 2: pool.run(run, 2, llama, "p2p", init_group=False)}


def check(parts: list[Result], path: Path, references: dict[str, Tensor]) -> None:
    """The logits of `parts` against others, what they export against what lies in `path`."""
    stored_logits, stored = hugging_face(path)
    references = {"Hugging Face": stored_logits, **references}
    found = {name: difference(assembled(parts), logits) for name, logits in references.items()}
    print("logits", found)
    assert max(found.values()) < BOUND
    for part in parts:
        assert part["exported"].keys() == stored.keys()
        assert all(torch.equal(part["exported"][name], weight) for name, weight in stored.items())


@pytest.mark.parametrize("grid", [[2, 1], [1, 2]], ids=str)
def test_a_model_of_hugging_face(
    grid: list[int], pool: RankPool, llama: Path, default: dict[int, list[Result]]
) -> None:
    parts = pool.run(run, 2, llama, "attention2d", grid, init_group=False)
    assert [part["kinds"] for part in parts] == [["ContextParallelAttention"]] * 2
    assert not any("ContextParallelAttention" in part["kinds"] for size in default.values() for part in size)
    check(parts, llama, {f"Bridge on {size}": assembled(results) for size, results in default.items()})
    expected = default[1][0]["gradients"]
    for part in (*parts, *default[2]):
        assert part["gradients"].keys() == expected.keys()  # so are the names in a checkpoint
        found = {name: difference(part["gradients"][name], gradient) for name, gradient in expected.items()}
        print(part["kinds"], "gradients", {name: f"{value:.1e}" for name, value in found.items()})
        assert max(found.values()) < 2 * BOUND


@pytest.mark.skipif(not installed("nvidia_resiliency_ext"), reason="Bridge's training needs nvidia-resiliency-ext")
def test_training(pool: RankPool, llama: Path) -> None:
    """Bridge's own `pretrain` from those weights: losses and gradient norms of the steps, as on one GPU."""
    [expected] = pool.run(trained, 1, llama, init_group=False)
    assert len(expected) == STEPS
    assert expected[0][0] - expected[-1][0] > 0.1, "it should learn, or parity says little"
    for steps in pool.run(trained, 2, llama, "attention2d", [2, 1], init_group=False):
        print("loss and norm", steps, "on one", expected)
        for (loss, norm), (expected_loss, expected_norm) in zip(steps, expected, strict=True):
            assert loss == pytest.approx(expected_loss, abs=2e-2)
            assert norm == pytest.approx(expected_norm, rel=2 * BOUND)


def trained(rank: int, path: Path, mode: str | None = None, grid: list[int] | None = None) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step."""
    from megatron.bridge.training import config, initialize
    from megatron.bridge.training.callbacks import Callback
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.pretrain import pretrain
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallelConfig

    steps: list[tuple[float, float]] = []

    class Keep(Callback):
        def on_train_step_end(self, context: Any) -> None:
            steps.append((context.loss_dict["lm loss"].item(), float(context.grad_norm)))

    start(rank)
    _, provider = provider_of(path, grid, mode)
    provider.seq_length = LENGTH
    settings = config.ConfigContainer(
        model=provider,
        train=config.TrainingConfig(train_iters=STEPS, global_batch_size=2, micro_batch_size=1),
        validation=config.ValidationConfig(eval_interval=STEPS + 1, eval_iters=0),
        optimizer=config.OptimizerConfig(optimizer="adam", lr=1e-3, min_lr=1e-3, use_distributed_optimizer=True, bf16=True),
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
        parallel_state._HIERARCHICAL_CONTEXT_PARALLEL_GROUPS = None  # upstream keeps them
    return steps


def test_a_checkpoint_of_ours(pool: RankPool, tmp_path: Path) -> None:
    """Trained on two GPUs, read by Bridge as any checkpoint of Megatron-LM, written for Hugging Face and read again."""
    args = arguments(
        num_layers=LLAMA["num_hidden_layers"],
        hidden_size=LLAMA["hidden_size"],
        ffn_hidden_size=LLAMA["intermediate_size"],
        seq_length=LENGTH,
        max_position_embeddings=LENGTH,
        normalization="RMSNorm",
        swiglu=True,
        disable_bias_linear=True,
        untie_embeddings_and_output_weights=True,
        init_method_std=LLAMA["initializer_range"],
        bf16=True,
        mock_data=True,
        num_workers=0,
        train_iters=2,
        save=tmp_path / "ours",
        no_save_optim=True,
        run_dir=tmp_path / "run",
        **context_parallel("attention2d", 2, 1),
    )
    pool.run(train, 2, args, init_group=False)
    [stored] = pool.run(to_hugging_face, 1, tmp_path / "ours" / "iter_0000002", tmp_path / "hf", init_group=False)
    parts = pool.run(run, 2, tmp_path / "hf", "attention2d", [1, 2], init_group=False)
    check(parts, tmp_path / "hf", {})
    for part in parts:
        assert part["parameters"].keys() == stored.keys()
        assert all(torch.equal(part["parameters"][name], weight) for name, weight in stored.items())


def train(rank: int, args: list[str]) -> None:
    torch.compiler.set_stance("force_eager")
    train_with_children(rank, args)


def to_hugging_face(rank: int, checkpoint: Path, path: Path) -> dict[str, Tensor]:
    """Converts as Bridge's documentation says; returns the parameters of the model that it loaded."""
    from megatron.bridge import AutoBridge
    from megatron.bridge.training.model_load_save import load_megatron_model, temporary_distributed_context
    from transformers import LlamaConfig

    torch.cuda.set_device(rank)
    with temporary_distributed_context(backend="nccl"):
        model = load_megatron_model(str(checkpoint), model_type="gpt")
        config = LlamaConfig(**LLAMA, architectures=["LlamaForCausalLM"], dtype="bfloat16")
        AutoBridge.from_hf_config(config).save_hf_pretrained(model, path, show_progress=False)
        [chunk] = model
        return {name.removeprefix("module."): p.detach().cpu() for name, p in chunk.named_parameters()}


@pytest.mark.parametrize("grid", [None, [2, 1]], ids=str)
def test_decentralised_groups_are_refused(grid: list[int] | None, pool: RankPool, llama: Path) -> None:
    """By Bridge itself where there are sizes, by us where they are left out."""
    said = "use_decentralized_pg=False"
    assert all(said in message for message in pool.run(decentralised, 2, llama, grid, init_group=False))


def decentralised(rank: int, path: Path, grid: list[int] | None) -> str:
    from megatron.bridge.training.config import DistributedInitConfig, RNGConfig
    from megatron.bridge.training.initialize import torch_dist_init
    from megatron.core.parallel_state import destroy_global_memory_buffer

    start(rank)
    _, provider = provider_of(path, grid, "attention2d")
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
        provider.provide_distributed_model(wrap_with_ddp=False, pg_collection=initialize())
    except (NotImplementedError if grid else ValueError) as refusal:
        return str(refusal)
    finally:
        destroy_global_memory_buffer()
    return "not refused"

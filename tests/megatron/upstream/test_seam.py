"""The patches: each name exists, each is still needed, and none outlives its context."""

import importlib.util
import inspect
import signal
import sys
from collections.abc import Callable
from contextlib import nullcontext
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from megatron_attn2d.errors import UsageError
from megatron_attn2d.megatron import layer_spec
from megatron_attn2d.megatron.upstream import compat, cpu
from megatron_attn2d.megatron.upstream.patching import Patch, UpstreamChangedError, applied
from tests.attention.dense import packed_zigzag
from tests.megatron.combinations import MODELS
from tests.megatron.runs import Tensors, arguments, context_parallel, train_states
from tests.pool import RankPool

without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="the seam is for hosts without a GPU")
BY_TARGET = {patch.target: patch for patch in (*cpu.PATCHES, *compat.FIXES, layer_spec.ATTENDING_IN_CONTEXT)}

RAISES_WITHOUT_A_DEVICE: dict[str, Callable[[], Any]] = {
    "torch.cuda:current_device": lambda: torch.cuda.current_device(),
    "torch.cuda:set_device": lambda: torch.cuda.set_device(0),
    "torch.cuda:synchronize": lambda: torch.cuda.synchronize(),
    "torch.cuda:Stream": lambda: torch.cuda.Stream(),
    "torch.cuda:current_stream": lambda: torch.cuda.current_stream(),
    "torch.cuda:get_device_properties": lambda: torch.cuda.get_device_properties(torch.device("cuda:0")),
    "torch.cuda:get_rng_state": lambda: torch.cuda.get_rng_state(),
    "torch.cuda.random:get_rng_state": lambda: torch.cuda.random.get_rng_state(device="cuda"),
}

CHANGES_A_RESUMED_RUN = [
    "torch.cuda:manual_seed",
    "megatron.core.tensor_parallel.random:_set_cuda_rng_state",
    "megatron.training.training:build_pretraining_data_loader",
    *(patch.target for patch in compat.FIXES if "DistributedOptimizer" in patch.target),
]

TESTED_BELOW = {
    "torch.autograd:_engine_run_backward",
    "megatron.training.training:initialize_megatron",
    "megatron.training.training:set_jit_fusion_options",
    "megatron.core.dist_checkpointing.strategies.filesystem_async:_results_queue",
    "megatron.core.datasets.utils:compile_helpers",
    "megatron.core.datasets.gpt_dataset:GPTDataset._get_num_epochs",
    "megatron.core.transformer.multi_token_prediction:MultiTokenPredictionBlock.__init__",
    "megatron.core.transformer.multi_token_prediction:_roll_tensor_packed_seq",
    "megatron.core.models.common.embeddings.yarn_rotary_pos_embedding:YarnRotaryEmbedding._set_cos_sin_cache",
    *(
        BALANCING := (
            "megatron.core.transformer.transformer_layer:TransformerLayer._maybe_unflatten_for_moe",
            "megatron.core.transformer.moe.router:get_tokens_per_expert_and_token_count",
        )
    ),
    "megatron.core.models.hybrid.hybrid_block:TENorm",
    "megatron.core.transformer.transformer_layer:TransformerLayer.get_layer_static_inputs",
    "megatron.core.transformer.transformer_layer:TransformerLayer._get_te_cuda_graph_replay_args",
}


def test_every_patch_has_a_test_that_it_is_needed() -> None:
    assert {*RAISES_WITHOUT_A_DEVICE, *CHANGES_A_RESUMED_RUN, *TESTED_BELOW} == set(BY_TARGET)


@pytest.mark.parametrize("target", BY_TARGET)
def test_the_patched_name_exists(target: str) -> None:
    owner, name = BY_TARGET[target].resolve()
    assert hasattr(owner, name)


@pytest.mark.parametrize("target", ["torch.cuda:no_name", "torch.no_module:name", "torch.cuda:Stream.no_name"])
def test_a_name_that_has_gone_is_named_with_the_reason(target: str) -> None:
    with (
        pytest.raises(UpstreamChangedError, match=rf"{target} is gone .* because it was needed once"),
        applied([Patch(target, lambda original: original, "it was needed once")]),
    ):
        pass


def test_patches_end_with_their_context() -> None:
    originals = {target: getattr(*patch.resolve()) for target, patch in BY_TARGET.items()}
    with applied(BY_TARGET.values()):
        unchanged = [target for target, patch in BY_TARGET.items() if getattr(*patch.resolve()) is originals[target]]
        assert not unchanged
    assert {target: getattr(*patch.resolve()) for target, patch in BY_TARGET.items()} == originals


@without_cuda
@pytest.mark.parametrize("target", RAISES_WITHOUT_A_DEVICE)
def test_torch_cuda_raises_without_a_device_and_answers_in_the_seam(target: str) -> None:
    ask = RAISES_WITHOUT_A_DEVICE[target]
    with pytest.raises((RuntimeError, AssertionError)):
        ask()
    with cpu.seam():
        ask()


@without_cuda
@pytest.mark.parametrize(
    "place",
    [
        lambda: torch.zeros(2, device="cuda"),
        lambda: torch.zeros(2, device=torch.device("cuda:0")),
        lambda: torch.empty(2, device=0),
        lambda: torch.tensor([1.0], device="cuda"),
        lambda: torch.zeros(2).cuda(),
        lambda: torch.zeros(2).cuda(0),
        lambda: torch.zeros(2).to("cuda"),
        lambda: torch.zeros(2).to(device="cuda:0", dtype=torch.float16),
        lambda: torch.empty_like(torch.zeros(2), device="cuda"),
        lambda: torch.nn.Linear(2, 2).cuda(0).weight,
        lambda: torch.empty(2, pin_memory=True),
        lambda: torch.zeros(2).pin_memory(),
    ],
)
def test_tensors_land_on_the_cpu_in_the_seam_only(place: Callable[[], torch.Tensor]) -> None:
    with pytest.raises((RuntimeError, AssertionError)):
        place()
    with cpu.seam():
        assert place().device.type == "cpu"


@without_cuda
def test_type_names_are_those_that_the_optimizers_compare_with() -> None:
    from megatron.core.optimizer import distrib_optimizer

    assert "model_param.type() == 'torch.cuda.FloatTensor'" in inspect.getsource(distrib_optimizer)
    with cpu.seam():
        assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
        assert torch.zeros(1).type(torch.float16).dtype == torch.float16
    assert torch.zeros(1).type() == "torch.FloatTensor"


@without_cuda
def test_compiled_functions_run_as_written_in_the_seam() -> None:
    from megatron.core import jit

    assert jit.jit_fuser is torch.compile
    compiled = []

    def backend(module: Any, inputs: Any) -> Any:
        compiled.append(module)
        return module.forward

    double = torch.compile(lambda x: 2 * x, backend=backend)
    with cpu.seam():
        assert double(torch.ones(1)) == 2
    assert not compiled
    double(torch.ones(1))
    assert compiled


@without_cuda
def test_the_random_state_of_the_tracker_is_that_of_the_cpu() -> None:
    from megatron.core.tensor_parallel import random

    torch.manual_seed(1)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    random._set_cuda_rng_state(state)
    assert not torch.equal(torch.get_rng_state(), state)
    with cpu.seam():
        random._set_cuda_rng_state(state)
    assert torch.equal(torch.get_rng_state(), state)


@without_cuda
def test_upstream_refuses_to_start_without_a_device() -> None:
    from megatron.training import training

    with pytest.raises(AssertionError, match="Megatron requires CUDA"):
        training.initialize_megatron()


@without_cuda
def test_the_warm_up_draws_random_numbers_by_the_number_of_context_ranks() -> None:
    from megatron.training import initialize, training

    def state_after(context_parallel_size: int) -> torch.Tensor:
        args = SimpleNamespace(
            bf16=False,
            fp16=False,
            swiglu=False,
            sequence_parallel=False,
            ffn_hidden_size=8,
            hidden_size=8,
            seq_length=8,
            micro_batch_size=1,
            tensor_model_parallel_size=1,
            context_parallel_size=context_parallel_size,
        )
        torch.manual_seed(1)
        with mock.patch.object(initialize, "get_args", return_value=args):
            training.set_jit_fusion_options(tp_size=1)
        return torch.get_rng_state()

    jit = BY_TARGET["megatron.training.training:set_jit_fusion_options"]
    with mock.patch.object(cpu, "PATCHES", [patch for patch in cpu.PATCHES if patch is not jit]), cpu.seam():
        assert not torch.equal(state_after(1), state_after(2))
    with cpu.seam():
        assert torch.equal(state_after(1), state_after(2))


@without_cuda
def test_saving_starts_a_manager_process_outside_the_seam_only() -> None:
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    with mock.patch.object(filesystem_async.mp, "get_context") as get_context:
        with cpu.seam():
            filesystem_async.get_write_results_queue()
        get_context.assert_not_called()
        with mock.patch.object(filesystem_async, "_results_queue", None):
            filesystem_async.get_write_results_queue()
        get_context.return_value.Manager.assert_called_once()


def test_upstream_exits_for_want_of_a_makefile() -> None:
    from megatron.core.datasets import utils

    with pytest.raises(SystemExit):
        utils.compile_helpers()
    with compat.applied_fixes():
        utils.compile_helpers()


def test_upstream_counts_the_epochs_of_no_tokens_for_ever() -> None:
    from megatron.core.datasets.gpt_dataset import GPTDataset

    config = SimpleNamespace(sequence_length=8, add_extra_token_to_sequence=1, split="9,1,0")
    empty: Any = SimpleNamespace(
        num_samples=1, config=config, index_split=SimpleNamespace(name="valid"), dataset_path="text"
    )

    def stop(number: int, frame: Any) -> None:
        raise TimeoutError

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(TimeoutError):
            GPTDataset._get_num_epochs(empty, 0)
    finally:
        signal.signal(signal.SIGALRM, previous)
    message = "the valid split of text holds no document but has a weight in --split 9,1,0"
    with compat.applied_fixes(), pytest.raises(ValueError, match=message):
        GPTDataset._get_num_epochs(empty, 0)


def test_upstream_gives_multi_token_prediction_an_attention_of_its_own() -> None:
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.training.models import gpt

    from megatron_attn2d.megatron import layer_spec

    transformer = TransformerConfig(
        num_layers=1, hidden_size=64, num_attention_heads=4, transformer_impl="local", mtp_num_layers=1
    )
    model = gpt.GPTModelConfig(transformer=transformer)

    def attention_of(spec: Any) -> Any:
        [layer] = gpt.mtp_block_spec(model, spec).layer_specs
        return layer.submodules.mtp_model_layer.submodules.self_attention.submodules.core_attention

    with (
        mock.patch.object(gpt_layer_specs, "get_mtp_num_layers_to_build", return_value=1),
        mock.patch.object(layer_spec, "get_num_layers_to_build", return_value=1),
    ):
        assert attention_of(layer_spec.attention2d_layer_spec(model)) is not layer_spec.CoreAttention


def shifted_packed_tokens(rank: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """By the lengths of the sequences: packed tokens shifted by upstream without and with the patch, and rightly."""
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer.multi_token_prediction import roll_tensor

    group = torch.distributed.group.WORLD
    places = [8, 8, 32]
    padded = torch.tensor([0, 8, 16, 48])
    at = packed_zigzag(places, torch.distributed.get_world_size(), rank)
    tokens = torch.arange(1, 49)[None]
    right = tokens.roll(-1)
    right[0, padded[1:] - 1] = 0
    found = []
    for lengths in (places, [7, 5, 29]):
        totals = torch.tensor(list(accumulate(lengths, initial=0)))
        packing = PackedSeqParams("thd", totals, totals, padded, padded)
        shifted = []
        for fixes in (nullcontext(), compat.applied_fixes()):
            with fixes:
                shifted.append(roll_tensor(tokens[:, at], cp_group=group, packed_seq_params=packing)[0])
        assert packing.cu_seqlens_q is totals
        found.append((*shifted, right[:, at]))
    return found


@pytest.mark.parametrize("ranks", [1, 2])
def test_upstream_shifts_packed_tokens_past_their_padding(ranks: int, pool: RankPool) -> None:
    unpadded, padded = ([one[i] for one in pool.run(shifted_packed_tokens, ranks)] for i in (0, 1))
    for _, ours, right in (*unpadded, *padded):
        assert torch.equal(ours, right)
    assert all(torch.equal(theirs, right) for theirs, _, right in unpadded)
    assert not all(torch.equal(theirs, right) for theirs, _, right in padded)  # else the patch can go


def balanced_gradients(rank: int, args: list[str]) -> list[float]:
    """Relative differences of a padded pack's gradients, without each patch of `BALANCING` and, last, with both.

    They are compared with those of the same tokens without padding, by upstream alone.
    """
    from megatron.training import get_args, training

    from megatron_attn2d.data.documents import PADDING, packed
    from megatron_attn2d.training import packed_batch, pretrain_gpt

    tokens = torch.arange(3, 3 + 52).split([16, 28, 8])
    found: list[float] = []

    def gradients(model: Any, places: list[int], multiple: int) -> Tensor:
        filled = [torch.cat([ids, torch.full((n - len(ids),), PADDING)]) for ids, n in zip(tokens, places, strict=True)]
        stream = torch.cat([*filled, torch.tensor([PADDING])]).numpy()
        sample = {key: x[None] for key, x in packed(stream, places, False, multiple).items()}
        where: Any = {"first": True, "last": True, "mtp": False, "counted": False}
        batch, packing = packed_batch.packed_on_this_rank(sample, get_args(), **where)
        losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"], packed_seq_params=packing)
        grads = torch.autograd.grad((losses * batch["loss_mask"]).sum(), list(model.parameters()))
        whole = torch.cat([grad.flatten() for grad in grads])
        torch.distributed.all_reduce(whole)
        return whole

    def unpatched(target: str) -> Any:
        owner, name = BY_TARGET[target].resolve()
        return mock.patch.object(owner, name, getattr(owner, name).__wrapped__)

    def instead_of_training(step: Any, model: Any, *rest: Any, **kwargs: Any) -> tuple[int, int]:
        masked, weighed = (unpatched(target) for target in BALANCING)
        with masked, weighed:
            right = gradients(model[0], [16, 28, 8], 4)
        for without in (*map(unpatched, BALANCING), nullcontext()):
            with without:
                padded = gradients(model[0], [16, 32, 16], 16)
            found.append(((padded - right).norm() / right.norm()).item())
        return 0, 0

    with mock.patch.object(training, "train", instead_of_training):
        pretrain_gpt.main(args)
    return found


def test_upstream_counts_padding_in_balancing_losses_and_multiplies_them_by_ranks(
    pool: RankPool, tmp_path: Path
) -> None:
    args = arguments(
        run_dir=tmp_path, mock_data=True, **MODELS["balanced moe"], **context_parallel("attention2d", 2, 1)
    )
    for counted, multiplied, ours in pool.run(balanced_gradients, 2, args):
        assert ours <= 1e-5
        assert min(counted, multiplied) > 1e-3


def test_upstream_shares_a_table_of_4096_positions_out_over_any_number_of_ranks() -> None:
    from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding

    group = SimpleNamespace(size=lambda: 3, rank=lambda: 1)

    def angles() -> Tensor:
        table: Any = YarnRotaryEmbedding(8, original_max_position_embeddings=4096, cp_group=group)  # type: ignore[arg-type]
        return table.forward(12)[0]

    with cpu.seam():
        with pytest.raises(RuntimeError, match="is invalid for input of size"):
            angles()
        with compat.applied_fixes():
            assert angles().shape[0] == 4


def test_upstream_gives_each_graph_a_mask_that_nobody_reads() -> None:
    from megatron.core.transformer import transformer_layer

    sizes = {"context_parallel_size": 2, "tensor_model_parallel_size": 1, "sequence_parallel": False, "hidden_size": 4}
    config = SimpleNamespace(**sizes, cuda_graph_modules=[], fine_grained_activation_offloading=False)
    layer: Any = transformer_layer.TransformerLayer.__new__(transformer_layer.TransformerLayer)
    layer.__dict__.update(config=config, self_attention=None, training=True)

    def masks() -> list[Tensor | None]:
        captured = layer.get_layer_static_inputs(8, 1)
        _, replayed = layer._get_te_cuda_graph_replay_args(torch.ones(4, 1, 4), attention_mask=None)
        return [captured.get("attention_mask"), replayed.get("attention_mask")]

    with (
        mock.patch.object(torch.cuda, "current_device", return_value="cpu"),
        mock.patch.dict(sys.modules, {"transformer_engine": mock.Mock(), "transformer_engine.pytorch": mock.Mock()}),
        mock.patch.object(transformer_layer, "is_te_min_version", return_value=True),
    ):
        assert [mask.shape for mask in masks() if mask is not None] == [(1, 1, 4, 8)] * 2
        with applied([patch for target, patch in BY_TARGET.items() if "TransformerLayer" in target]):
            assert masks() == [None, None]


@pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is not None, reason="for hosts without it")
def test_upstream_ends_hybrid_models_with_a_norm_of_transformer_engine() -> None:
    from megatron.core.models.hybrid import hybrid_block
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(num_layers=1, hidden_size=64, num_attention_heads=4)
    with pytest.raises(ImportError, match="Transformer Engine is not installed"):
        hybrid_block.TENorm(config=config, hidden_size=64)
    with compat.applied_fixes():
        assert isinstance(hybrid_block.TENorm(config=config, hidden_size=64), torch.nn.LayerNorm)


class PlacesOnTheGpu(torch.autograd.Function):
    """Makes a tensor in its backward pass, as Megatron's sequence-parallel regions do."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0] + torch.zeros(1, device="cuda")


@without_cuda
def test_torch_sets_the_seam_aside_while_it_runs_backward() -> None:
    others = [patch for patch in cpu.PATCHES if patch.target != "torch.autograd:_engine_run_backward"]
    with mock.patch.object(cpu, "PATCHES", others), cpu.seam(), pytest.raises((RuntimeError, AssertionError)):
        torch.autograd.backward(PlacesOnTheGpu.apply(torch.ones(1, requires_grad=True)))
    with cpu.seam():
        x = torch.ones(1, requires_grad=True)
        torch.autograd.backward(PlacesOnTheGpu.apply(x))
        assert x.grad == 1


@pytest.fixture(scope="module")
def undisturbed(pool: RankPool, text: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Tensors]:
    return train_states(pool, 1, tmp_path_factory.mktemp("undisturbed"), **_resumable(text))


@without_cuda
@pytest.mark.parametrize("target", [None, *CHANGES_A_RESUMED_RUN])
def test_a_resumed_run_fails_or_differs_without_the_patch(
    target: str | None, pool: RankPool, text: Path, undisturbed: list[Tensors], tmp_path: Path
) -> None:
    checkpoint = tmp_path / "checkpoint"
    first = arguments(run_dir=tmp_path, save=checkpoint, exit_interval=1, **_resumable(text))
    second = arguments(run_dir=tmp_path, load=checkpoint, **_resumable(text))
    [states] = pool.run(_train_without, 1, target, first, second)
    same = states is not None and all(torch.equal(states[name], value) for name, value in undisturbed[0].items())
    assert same == (target is None)


def _resumable(text: Path) -> dict[str, Any]:
    options = {"num_layers": 1, "train_iters": 3, "hidden_dropout": 0.1, "use_distributed_optimizer": True}
    return {"data_path": text, **options}


def _train_without(rank: int, target: str | None, *runs: list[str]) -> Tensors | None:
    """The states after the runs, one after the other, without the patch of `target`; None where they raise."""
    from tests.megatron.runs import _train_states

    with (
        mock.patch.object(cpu, "PATCHES", [patch for patch in cpu.PATCHES if patch.target != target]),
        mock.patch.object(compat, "FIXES", [patch for patch in compat.FIXES if patch.target != target]),
    ):
        try:
            return [_train_states(rank, args, sigterm_at=None) for args in runs][-1]
        except (RuntimeError, AssertionError, KeyError, UsageError):
            return None

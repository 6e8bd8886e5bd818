"""The entry point: what it refuses, and that it can be called again and again."""

from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_attn2d.errors import UsageError
from megatron_attn2d.training import micro_batch, pretrain_gpt
from tests.attention.test_capture import WAITS, Refuses
from tests.megatron.runs import arguments, context_parallel, metrics, train
from tests.pool import RankFailed, RankPool


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"no_such_flag": True}, "UsageError: Megatron's arguments: unrecognized arguments: --no-such-flag"),
        ({"seq_length": "long"}, "UsageError: Megatron's arguments: argument --seq-length: invalid int value: 'long'"),
        ({"hybrid_context_parallel": True}, "UsageError: --hybrid-context-parallel is not"),
        (  # while the arguments are read
            {"swiglu": True, "squared_relu": True},
            r"UsageError: Megatron's arguments: assert not args.swiglu \(argument_utils.py, line \d+\); given: "
            r"model.swiglu = true, megatron_args.squared_relu = true$",
        ),
        (
            {"num_experts": 3, "expert_model_parallel_size": 2},
            "UsageError: Megatron's arguments: .*xpert.*; given: megatron_args.num_experts = 3, parallelism.expert = 2",
        ),
        (  # while the model is configured, and built
            {"no_rope_freq": "[1,0,1]"},
            r"UsageError: .*no_rope list .*; given: megatron_args.no_rope_freq = \[1,0,1\], model.num_layers = 4$",
        ),
        (
            {"apply_layernorm_1p": True},
            "UsageError: .*zero_centered_gamma not supported .*; given: megatron_args.apply_layernorm_1p = true$",
        ),
        (  # while the optimizer is
            {"lr_warmup_iters": 11},
            "UsageError: .*: assert self.lr_warmup_steps < .*; given: optimizer.lr_warmup_iters = 11$",
        ),
        (  # in the first step, which doesn't check
            {"num_experts": 1, "moe_ffn_hidden_size": 64, "disable_bias_linear": True},
            r"UsageError: Megatron's arguments: Megatron fails in .*topk.* \(moe_utils.py, line \d+\): selected index ",
        ),
        ({"hybrid_layer_pattern": "*M"}, "UsageError: hybrid_layer_pattern: M and G, Mamba and Gated DeltaNet, need"),
    ],
)
def test_what_it_refuses_it_names(options: dict[str, object], message: str, pool: RankPool, tmp_path: Path) -> None:
    with pytest.raises(RankFailed, match=message):
        pool.run(_run, 1, [arguments(run_dir=tmp_path, mock_data=True, **options)])


@pytest.mark.parametrize(("scanned", "where"), [(True, "text"), (False, "a batch")])
def test_ids_outside_the_vocabulary_are_refused(scanned: bool, where: str, text: Path, pool: RankPool, tmp_path: Path):
    """Of a set without a description, before the first step; and in each batch, as only parts of a large one are read.

    Two tensor ranks would embed them as zeros: each takes the other to hold them.
    """
    options = {"data_path": text, "vocab_size": 100, "null_tokenizer_eod_id": None, "tensor_model_parallel_size": 2}
    message = rf"UsageError: \S*{where} holds token \d+, and the vocabulary of NullTokenizer has 100, from 0"
    with pytest.raises(RankFailed, match=message):
        pool.run(_run_scanned, 2, scanned, arguments(run_dir=tmp_path, **options))


def test_batches_are_looked_at_before_a_graph_reads_them() -> None:
    from megatron.core.full_cuda_graph import StaticBufferLoader

    batch = {"tokens": torch.tensor([[3, 7]]), "labels": torch.tensor([[7, 9]]), "attention_mask": None}
    with mock.patch.object(micro_batch, "check_vocabulary", side_effect=UsageError) as check:
        with micro_batch.checked_buffers():
            for held in (batch, (batch,)):
                with pytest.raises(UsageError):
                    StaticBufferLoader.__call__(mock.Mock(), held, "training", 0)
        on_gpu = {key: mock.Mock(is_cuda=True, max=mock.Mock(side_effect=AssertionError)) for key in batch}
        micro_batch.check_batch(on_gpu)
    assert check.call_args_list == [mock.call(9, "a batch")] * 2


def _run_without_waiting(rank: int, args: list[str]) -> None:
    """Passes of the second step as an iteration's CUDA graph captures them: who waits for the GPU there fails."""
    from megatron.training import training

    steps: list[int] = []

    def passes(get: Any) -> Any:
        def watched(**asked: Any) -> Any:
            steps.append(len(steps))
            with ExitStack() as stack:
                if len(steps) == 1:  # ranks compare what they ask for
                    return get()(**asked)
                for name in WAITS:
                    fails = mock.Mock(side_effect=AssertionError(f"Tensor.{name} waits for the GPU"))
                    stack.enter_context(mock.patch.object(torch.Tensor, name, fails))
                stack.enter_context(Refuses())
                return get()(**asked)

        return lambda *_, **__: watched

    with (
        mock.patch.object(training, "get_forward_backward_func", passes(training.get_forward_backward_func)),
        mock.patch.object(micro_batch, "check_batch"),  # which leaves batches on a GPU alone
    ):
        pretrain_gpt.main(args)


def test_passes_of_a_step_wait_nowhere_for_the_gpu(pool: RankPool, tmp_path: Path) -> None:
    options = {"mock_data": True, "num_layers": 1, "train_iters": 2, "no_check_for_nan_in_loss_and_grad": True}
    options |= context_parallel("attention2d", 2, 1)
    pool.run(_run_without_waiting, 2, arguments(run_dir=tmp_path, **options))
    assert len(metrics(tmp_path)) == 2


def test_frequencies_of_rope_are_scaled_by_the_factor_given(pool: RankPool, tmp_path: Path) -> None:
    norms = set()
    for factor in (1.0, 8.0, 64.0):
        options = {"use_rope_scaling": True, "rope_scaling_factor": factor, "rotary_base": 1000000}
        steps = train(pool, 1, tmp_path / str(factor), mock_data=True, num_layers=1, train_iters=1, **options)
        norms.add(steps[0]["grad_norm"])
    assert len(norms) == 3


def test_it_can_be_called_again_after_success_and_failure(pool: RankPool, tmp_path: Path) -> None:
    good = arguments(run_dir=tmp_path, mock_data=True, num_layers=1, train_iters=1)
    assert pool.run(_run, 2, [good, [*good, "--no-such-flag"], good]) == [["", "UsageError", ""]] * 2


@pytest.mark.parametrize("init_group", [True, False])
def test_it_ends_the_process_group_that_it_made_and_no_other(init_group: bool, pool: RankPool, tmp_path: Path) -> None:
    args = arguments(run_dir=tmp_path, mock_data=True, num_layers=1, train_iters=1)
    assert pool.run(_has_group_after, 2, args, init_group=init_group) == [init_group] * 2


def _run_scanned(rank: int, scanned: bool, args: list[str]) -> None:
    with nullcontext() if scanned else mock.patch("megatron_attn2d.data.matching.largest_id", return_value=0):
        _run(rank, [args])


def _run(rank: int, runs: list[list[str]]) -> list[str]:
    """The names of what the runs raised, one after the other; what a single one raises is raised."""
    from megatron_attn2d.training import pretrain_gpt

    raised = []
    for args in runs:
        try:
            pretrain_gpt.main(args)
            raised.append("")
        except ValueError as error:
            if len(runs) == 1:
                raise
            raised.append(type(error).__name__)
    return raised


def _has_group_after(rank: int, args: list[str]) -> bool:
    from megatron_attn2d.training import pretrain_gpt

    pretrain_gpt.main(args)
    return torch.distributed.is_initialized()

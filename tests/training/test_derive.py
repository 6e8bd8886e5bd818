"""Derived arguments: what follows from the host, what stays as given, and what is refused."""

import dataclasses
import logging
import os
import re
from unittest import mock

import pytest

from megatron_attn2d.config import ConfigError, load_run, megatron_arguments, upstream_flags
from megatron_attn2d.errors import UsageError
from megatron_attn2d.megatron.refusals import REFUSED
from megatron_attn2d.training.derive import (
    Installed,
    derived_arguments,
    set_environment,
    with_derived_arguments,
)

BARE = Installed(
    cuda=False,
    transformer_engine=False,
    apex=False,
    gradient_accumulation_kernel=False,
    softmax_kernels=False,
)
FULL = Installed(
    cuda=True,
    transformer_engine=True,
    apex=True,
    gradient_accumulation_kernel=True,
    softmax_kernels=True,
)
SWITCHES = {
    flag: row
    for name, row in REFUSED.items()
    if (flag := f"--{name.replace('_', '-')}") in upstream_flags.options() and row.value is None
}
ALWAYS = ["--no-create-attention-mask-in-dataloader", "--calculate-per-token-loss"]

CASES = {
    "CUDA graphs": (FULL, ["--cuda-graph-impl", "local"], ["--te-rng-tracker"]),
    "CUDA graphs without Transformer Engine": (
        dataclasses.replace(FULL, transformer_engine=False),
        ["--cuda-graph-impl", "local", "--transformer-impl", "local"],
        [],
    ),
    "one CUDA graph": (
        FULL,
        ["--cuda-graph-impl", "full_iteration"],
        ["--te-rng-tracker", "--no-check-for-nan-in-loss-and-grad"],
    ),
    "CUDA graphs by their older name": (FULL, ["--enable-cuda-graph"], ["--te-rng-tracker"]),
    "everything there": (FULL, [], []),
    "no Transformer Engine": (
        dataclasses.replace(FULL, transformer_engine=False),
        [],
        ["--transformer-impl", "local"],
    ),
    "neither that nor Apex": (
        dataclasses.replace(FULL, transformer_engine=False, apex=False),
        [],
        ["--transformer-impl", "local", "--no-persist-layer-norm", "--no-rope-fusion"],
    ),
    "torch's Adam, distributed": (
        dataclasses.replace(FULL, transformer_engine=False, apex=False),
        ["--use-distributed-optimizer", "--transformer-impl", "local"],
        ["--no-persist-layer-norm", "--no-rope-fusion", "--dist-ckpt-optim-fully-reshardable"],
    ),
    "no kernels": (
        dataclasses.replace(FULL, gradient_accumulation_kernel=False, softmax_kernels=False),
        [],
        ["--no-gradient-accumulation-fusion", "--no-masked-softmax-fusion"],
    ),
    "a grid": (
        FULL,
        ["--hierarchical-context-parallel-sizes", "2", "2"],
        ["--high-priority-stream-groups", "hcp"],
    ),
    "a grid, other streams asked for": (
        FULL,
        ["--hierarchical-context-parallel-sizes", "2", "2", "--high-priority-stream-groups", "dp_cp", "hcp"],
        [],
    ),
    "a grid on CPU": (
        dataclasses.replace(FULL, cuda=False),
        ["--hierarchical-context-parallel-sizes", "2", "2", "--num-workers", "0"],
        ["--distributed-backend", "gloo"],
    ),
    "CPU": (
        dataclasses.replace(FULL, cuda=False),
        [],
        ["--distributed-backend", "gloo", "--num-workers", "0"],
    ),
    "CPU, loader workers asked for": (
        dataclasses.replace(FULL, cuda=False),
        ["--num-workers", "2", "--distributed-backend", "gloo"],
        [],
    ),
    "CPU, experts": (
        dataclasses.replace(FULL, cuda=False),
        ["--num-experts", "4", "--num-workers", "0"],
        ["--distributed-backend", "gloo", "--moe-token-dispatcher-type", "allgather"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_arguments_follow_from_what_is_installed(case: str) -> None:
    installed, given, derived = CASES[case]
    assert with_derived_arguments(given, installed) == [*given, *ALWAYS, *derived]


def test_deriving_twice_adds_nothing() -> None:
    once = with_derived_arguments(["--use-distributed-optimizer"], BARE)
    assert with_derived_arguments(once, BARE) == once


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ["--transformer-impl", "transformer_engine"],
            "--transformer-impl transformer_engine can't work: Transformer Engine is not installed; choose local",
        ),
        (
            ["--distributed-backend", "nccl"],
            "--distributed-backend nccl can't work: there is no CUDA device, so ranks run on the CPU; choose gloo",
        ),
        (
            ["--num-experts", "4", "--moe-token-dispatcher-type", "alltoall"],
            "--moe-token-dispatcher-type alltoall can't work: on CPU ranks the others fail; choose allgather",
        ),
        (
            ["--attention-backend", "local"],
            "--attention-backend local is not supported: it makes Megatron replace context-parallel attention",
        ),
        (["--fp8-format", "hybrid"], "--fp8-format needs Transformer Engine, which is not installed; leave it out"),
        (
            ["--cuda-graph-impl", "local"],
            "--cuda-graph-impl local needs a GPU, and there is no CUDA device; leave it out",
        ),
        *(([flag], f"{flag} is not supported: it {row.reason}; {row.choice}") for flag, row in SWITCHES.items()),
    ],
)
def test_a_contradiction_is_refused_by_name(given: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        derived_arguments(given, BARE)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ["--cuda-graph-impl", "transformer_engine"],
            "--cuda-graph-impl transformer_engine needs Transformer Engine, which is not installed; choose local",
        ),
        (["--cuda-graph-impl", "local", "--check-finite-attention"], "--check-finite-attention waits for the GPU"),
        (["--enable-cuda-graph", "--log-attention-communication"], "--log-attention-communication measures by the CPU"),
        (
            ["--cuda-graph-impl", "full_iteration", "--timing-log-level", "1"],
            "--timing-log-level 1 waits for the GPU under --cuda-graph-impl full_iteration; choose 0",
        ),
    ],
)
def test_what_no_cuda_graph_holds_is_refused(given: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        derived_arguments(given, dataclasses.replace(FULL, transformer_engine=False))


def test_what_ranks_refuse_the_configuration_refuses_before() -> None:
    for flag in SWITCHES:
        with pytest.raises(ConfigError, match=f"megatron_args.{flag[2:].replace('-', '_')} = "):
            megatron_arguments(load_run("configs/runs/quickstart.yaml", [f"megatron_args.{flag[2:]}=true"]))


@pytest.mark.parametrize(("rank", "lines"), [("0", 2), ("1", 0)])
def test_rank_0_logs_each_with_its_reason(
    rank: str, lines: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", rank)
    with caplog.at_level(logging.INFO, "megatron_attn2d.training.derive"):
        with_derived_arguments([], FULL)
    assert len(caplog.messages) == lines
    assert all(re.fullmatch(r"derived --[\w-]+( \w+)?: .{20,}", message) for message in caplog.messages)


@pytest.mark.parametrize(
    ("installed", "given", "value"),
    [
        (FULL, ["--context-parallel-size", "4"], "1"),
        (FULL, ["--tensor-model-parallel-size", "2"], "1"),
        (FULL, ["--tensor-model-parallel-size", "1"], None),
        (FULL, ["--context-parallel-size", "4", "--use-megatron-fsdp"], None),
        (BARE, ["--context-parallel-size", "4"], None),
    ],
)
def test_the_number_of_connections_is_set_where_megatron_asks_for_it(
    installed: Installed, given: list[str], value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "")  # so that it is restored
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS")
    set_environment(given, installed)
    assert os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == value


@pytest.mark.parametrize(
    ("given", "shell", "value"),
    [
        (["--cuda-graph-impl", "local"], {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}, "0"),
        (["--cuda-graph-impl", "local"], {"PYTORCH_ALLOC_CONF": "a:1,expandable_segments:True"}, "0"),
        (["--cuda-graph-impl", "none"], {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}, None),
        (["--cuda-graph-impl", "local"], {"NCCL_GRAPH_REGISTER": "1"}, "1"),
        (
            ["--cuda-graph-impl", "local"],
            {"NCCL_GRAPH_REGISTER": "1", "PYTORCH_ALLOC_CONF": "expandable_segments:True"},
            "NCCL_GRAPH_REGISTER='1': NCCL would register the buffers of messages in CUDA graphs, which "
            "PYTORCH_ALLOC_CONF=expandable_segments:True does not allow; choose NCCL_GRAPH_REGISTER=0, or leave "
            "expandable_segments:True out of PYTORCH_ALLOC_CONF",
        ),
    ],
)
def test_nccl_registers_no_buffers_of_graphs_in_expandable_segments(
    given: list[str], shell: dict[str, str], value: str | None
) -> None:
    with mock.patch.dict(os.environ, shell):
        for name in {"NCCL_GRAPH_REGISTER", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"} - set(shell):
            os.environ.pop(name, None)
        if value is not None and len(value) > 1:
            with pytest.raises(UsageError, match=re.escape(value)):
                set_environment(given, FULL)
        else:
            set_environment(given, FULL)
            assert os.environ.get("NCCL_GRAPH_REGISTER") == value

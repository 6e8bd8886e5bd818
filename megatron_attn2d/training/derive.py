"""Derives the Megatron arguments that follow from installed packages and the device, so that nobody must know them."""

from __future__ import annotations

import importlib.util
import itertools
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_attn2d.config import effects
from megatron_attn2d.errors import UsageError
from megatron_attn2d.megatron.refusals import refusal
from megatron_attn2d.megatron.upstream.graph_environment import graph_fault

logger = logging.getLogger(__name__)

_OLD_NAMES = {"--enable-cuda-graph": "local", "--external-cuda-graph": "transformer_engine"}
"""Old flags that Megatron still takes, and the --cuda-graph-impl that each stands for."""
_NOT_IN_GRAPHS = {  # flag: why no CUDA graph can hold it
    "--log-attention-communication": "measures by the CPU's calls, of which a replayed graph makes none,",
    "--check-finite-attention": "waits for the GPU in each layer, which a graph cannot,",
}
_KEYS = {"--fp8-format": " (training.fp8: none)", "--cuda-graph-impl": " (training.cuda_graphs: none)"}
"""The key of a run's YAML that leaves out the flag."""


@dataclass(frozen=True)
class Installed:
    """The device and the packages on which the derived arguments depend."""

    cuda: bool
    transformer_engine: bool
    apex: bool
    gradient_accumulation_kernel: bool
    softmax_kernels: bool

    @classmethod
    def here(cls) -> Installed:
        """The device and the packages of this host."""
        import torch  # takes seconds, and a dry run describes another host

        return cls(
            cuda=torch.cuda.is_available(),
            transformer_engine=_has_module("transformer_engine"),
            apex=_has_module("apex"),
            gradient_accumulation_kernel=_has_module("fused_weight_gradient_mlp_cuda"),
            softmax_kernels=_has_module("scaled_masked_softmax_cuda"),
        )


@dataclass(frozen=True)
class Derived:
    """One derived argument: a flag, its value if it takes one, and the reason."""

    flag: str
    reason: str
    value: str | None = None
    required: bool = True
    """Whether another value can't work, so that it is refused if it is given."""


def with_derived_arguments(arguments: Sequence[str], installed: Installed | None = None) -> list[str]:
    """`arguments`, and after them the derived ones, which rank 0 logs with their reasons.

    Raises:
        ValueError: `arguments` contradicts what is installed or what this project supports.
    """
    derived = derived_arguments(arguments, installed or Installed.here())
    if os.environ.get("RANK", "0") == "0":
        for one in derived:
            logger.info("derived %s%s: %s", one.flag, f" {one.value}" if one.value else "", one.reason)
    return [*arguments, *(token for one in derived for token in (one.flag, one.value) if token is not None)]


def derived_arguments(arguments: Sequence[str], installed: Installed) -> list[Derived]:
    """The arguments to add to `arguments`; a flag that is given keeps its value.

    Raises:
        ValueError: `arguments` contradicts what is installed or what this project supports.
    """
    given = _with_values(arguments)
    for flag, value in given.items():
        if flag.startswith("--") and (refused := refusal(flag[2:].replace("-", "_"), value)):
            what = flag if refused.value is None else f"{flag} {value}"
            raise ValueError(f"{what} is not supported: it {refused.reason}; {refused.choice}")
    for unread in effects.ignored(arguments):
        raise ValueError(f"{' '.join([unread.flag, *unread.values])}: {unread.reason}; {unread.choice}")
    for flag in ("--fp8-format", "--fp4-format"):
        if flag in given and not installed.transformer_engine:
            raise ValueError(
                f"{flag} needs Transformer Engine, which is not installed; leave it out{_KEYS.get(flag, '')}"
            )
    _refuse_impossible_graphs(given, installed)
    derived = []
    for one in _consequences(given, installed):
        if one.flag not in given:
            derived.append(one)
        elif one.required and one.value is not None and given[one.flag] != one.value:
            raise ValueError(f"{one.flag} {given[one.flag]} can't work: {one.reason}; choose {one.value}")
    return derived


def _refuse_impossible_graphs(given: dict[str, str], installed: Installed) -> None:
    implementation = _graphs(given)
    if implementation == "none":
        return
    what = f"--cuda-graph-impl {implementation}"
    leave_out = f"leave it out{_KEYS['--cuda-graph-impl']}"
    if not installed.cuda:
        raise ValueError(f"{what} needs a GPU, and there is no CUDA device; {leave_out}")
    if implementation == "transformer_engine" and not installed.transformer_engine:
        raise ValueError(f"{what} needs Transformer Engine, which is not installed; choose local")
    for flag, why in _NOT_IN_GRAPHS.items():
        if flag in given:
            raise ValueError(f"{flag} {why} under {what}: leave out one of the two")
    if implementation == "full_iteration" and given.get("--timing-log-level", "0") != "0":
        raise ValueError(f"--timing-log-level {given['--timing-log-level']} waits for the GPU under {what}; choose 0")


def _graphs(given: dict[str, str]) -> str:
    """The implementation of CUDA graphs that the arguments ask for, `none` without graphs."""
    old = next((implementation for flag, implementation in _OLD_NAMES.items() if flag in given), "none")
    return given.get("--cuda-graph-impl", old)


def _consequences(given: dict[str, str], installed: Installed) -> Iterator[Derived]:
    """The derived arguments, also those whose flag is given already."""
    yield Derived(
        "--no-create-attention-mask-in-dataloader",
        "attention masks by position; the loader would build a dense mask of sequence x sequence for every sample",
    )
    yield Derived("--calculate-per-token-loss", "every token weighs the same, however many context ranks there are")

    if not installed.transformer_engine:
        yield Derived("--transformer-impl", "Transformer Engine is not installed", "local")
    if not (installed.transformer_engine or installed.apex):
        neither = "neither Transformer Engine nor Apex is installed"
        yield Derived("--no-persist-layer-norm", f"{neither}: the norm is torch's")
        yield Derived("--no-rope-fusion", f"{neither}: the fused kernel is missing")
        if "--use-distributed-optimizer" in given:
            yield Derived(
                "--dist-ckpt-optim-fully-reshardable",
                f"{neither}: it is the one checkpoint format that torch's Adam can be resumed from on other sizes",
            )
    if not installed.gradient_accumulation_kernel:
        yield Derived(
            "--no-gradient-accumulation-fusion", "Apex's extension fused_weight_gradient_mlp_cuda is not installed"
        )
    if not installed.softmax_kernels:
        yield Derived("--no-masked-softmax-fusion", "the extension scaled_masked_softmax_cuda is not installed")

    if _graphs(given) != "none":
        if installed.transformer_engine:
            yield Derived("--te-rng-tracker", "each replay of a CUDA graph must draw dropout anew")
        if _graphs(given) == "full_iteration":
            yield Derived("--no-check-for-nan-in-loss-and-grad", "it waits for the GPU, which a CUDA graph cannot")

    if installed.cuda and "--hierarchical-context-parallel-sizes" in given:
        yield Derived(
            "--high-priority-stream-groups",
            "attention2d's messages (hcp) begin although a kernel that hides them has begun before",
            "hcp",
            required=False,
        )
    if not installed.cuda:
        yield Derived("--distributed-backend", "there is no CUDA device, so ranks run on the CPU", "gloo")
        yield Derived("--num-workers", "CPU ranks have no core to spare for loading data", "0", required=False)
        if "--num-experts" in given:
            yield Derived("--moe-token-dispatcher-type", "on CPU ranks the others fail", "allgather")


def set_environment(arguments: Sequence[str], installed: Installed | None = None) -> None:
    """Set environment variables that Megatron needs, and NCCL in CUDA graphs, if the shell has not set them.

    Call it before CUDA starts.

    Raises:
        UsageError: a variable of the shell contradicts the arguments; names the variable.
    """
    installed = installed or Installed.here()
    if not installed.cuda:
        return
    given = _with_values(arguments)
    split = any(given.get(f"--{kind}-parallel-size", "1") != "1" for kind in ("tensor-model", "context"))
    if split and not {"--use-torch-fsdp2", "--use-megatron-fsdp"} & set(given):
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if _graphs(given) != "none" and graph_fault(os.environ):
        os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")
        if fault := graph_fault(os.environ):
            raise UsageError("; ".join(fault))


def _with_values(arguments: Sequence[str]) -> dict[str, str]:
    """Each word, mapped to the next one, which is the value if the word is a flag that takes one."""
    return dict(itertools.zip_longest(arguments, arguments[1:], fillvalue=""))


def _has_module(name: str) -> bool:
    return importlib.util.find_spec(name) is not None

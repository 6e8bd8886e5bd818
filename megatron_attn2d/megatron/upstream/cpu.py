"""The seam that lets Megatron-Core's `pretrain()` run on CPU ranks with Gloo.

Megatron-Core 0.19 assumes CUDA: it places tensors on 'cuda', asks `torch.cuda` for devices, streams and random states,
and warms up and compiles fused kernels. `seam()` answers those questions for the CPU, in this process, for as long
as it is entered. It does nothing where CUDA is available. Three kinds of entry:

- tensors placed on 'cuda' land on the CPU: one torch function mode (`_CudaIsCpu`) covers every factory, `.cuda()`,
  `.to()`, `pin_memory` and the type names that upstream compares with;
- `torch.cuda` questions that raise without a device (`PATCHES`, the first half);
- decisions of Megatron's that are wrong or slow without a GPU (`PATCHES`, the second half).

What upstream needs on GPUs too, when Apex and Transformer Engine are missing, is in `compat.py`.
"""

from __future__ import annotations

import functools
import logging
import queue
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from megatron_attn2d.megatron.upstream.patching import Patch, applied

_BLACKWELL = 10  # the first architecture for which upstream asks for no CUDA_DEVICE_MAX_CONNECTIONS


def _on_cpu(device: Any) -> Any:
    """`device`, or 'cpu' where it names a CUDA device ('cuda', 'cuda:0', torch.device('cuda'), or an index)."""
    if isinstance(device, str | torch.device):
        return "cpu" if str(device).startswith("cuda") else device
    return "cpu" if isinstance(device, int) and not isinstance(device, bool) else device


class _CudaIsCpu(TorchFunctionMode):
    """Redirects to the CPU what is placed on a CUDA device, by literal or by index."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)  # optimizers compare with 'torch.cuda.FloatTensor'
        if func is torch.Tensor.to:
            args = (args[0], *(_on_cpu(a) if isinstance(a, str | torch.device | int) else a for a in args[1:]))
        if kwargs:
            if "device" in kwargs:
                kwargs["device"] = _on_cpu(kwargs["device"])
            if "pin_memory" in kwargs:
                kwargs["pin_memory"] = False
        return func(*args, **(kwargs or {}))


class _Stream:
    """A stream of the CPU: everything is in order already. A class, as upstream annotates with it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def _constant(value: Any) -> Callable[[Any], Any]:
    """A patch that answers `value`, whatever it is asked."""
    return lambda original: lambda *args, **kwargs: value


def _as_is(value: Any) -> Callable[[Any], Any]:
    return lambda original: value


def _with_a_device(initialize_megatron: Any) -> Any:
    """`initialize_megatron` as on a host with one device; only there, since torch itself asks the same questions."""

    @functools.wraps(initialize_megatron)
    def initialize(*args: Any, **kwargs: Any) -> Any:
        reason = "initialize_megatron builds the model-parallel groups and seeds only when it counts a device"
        with applied(
            [
                Patch("torch.cuda:is_available", _constant(True), reason),
                Patch("torch.cuda:device_count", _constant(1), reason),
            ]
        ):
            return initialize_megatron(*args, **kwargs)

    return initialize


def _with_own_generator(build_pretraining_data_loader: Any) -> Any:
    """Data loaders with a generator of their own: iterating one must not draw from the generator of the dropout."""

    @functools.wraps(build_pretraining_data_loader)
    def build(*args: Any, **kwargs: Any) -> Any:
        loader = build_pretraining_data_loader(*args, **kwargs)
        if isinstance(loader, torch.utils.data.DataLoader):
            loader.generator = torch.Generator().manual_seed(torch.initial_seed())
        return loader

    return build


def _within_the_mode(run_backward: Any) -> Any:
    """`run_backward` with what is placed on 'cuda' on the CPU."""

    @functools.wraps(run_backward)
    def run(*args: Any, **kwargs: Any) -> Any:
        with _CudaIsCpu():
            return run_backward(*args, **kwargs)

    return run


def _set_rng_state(original: Any) -> Any:
    return lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(new_state)


_NO_DEVICE = "it raises on a host without a CUDA device"
_RNG = "random states live in the CPU's generator; queued for a CUDA that never starts, numbers would change silently"

PATCHES = (
    # torch.cuda, for whoever asks it
    Patch("torch.cuda:current_device", _constant(0), _NO_DEVICE),
    Patch("torch.cuda:set_device", _constant(None), _NO_DEVICE),
    Patch("torch.cuda:synchronize", _constant(None), _NO_DEVICE),
    Patch("torch.cuda:Stream", _as_is(_Stream), _NO_DEVICE),
    Patch("torch.cuda:current_stream", _as_is(_Stream), _NO_DEVICE),
    Patch("torch.cuda:get_device_properties", _constant(SimpleNamespace(major=_BLACKWELL, minor=0)), _NO_DEVICE),
    Patch("torch.cuda:manual_seed", _as_is(torch.manual_seed), _RNG),
    Patch("torch.cuda:get_rng_state", lambda original: lambda device="cuda": torch.get_rng_state(), _RNG),
    Patch("torch.cuda.random:get_rng_state", lambda original: lambda device="cuda": torch.get_rng_state(), _RNG),
    Patch(
        "torch.autograd:_engine_run_backward",
        _within_the_mode,
        "torch.autograd.backward sets function modes aside, and Megatron recomputes layers within it",
    ),
    # Megatron
    Patch("megatron.core.tensor_parallel.random:_set_cuda_rng_state", _set_rng_state, _RNG),
    Patch(
        "megatron.training.training:initialize_megatron",
        _with_a_device,
        "pretrain() refuses to start, builds no groups and seeds nothing where it counts no device",
    ),
    Patch(
        "megatron.training.training:set_jit_fusion_options",
        _constant(None),
        "its warm-up draws random numbers of shape sequence/context ranks: fresh weights would depend on their number",
    ),
    Patch(
        "megatron.training.training:build_pretraining_data_loader",
        _with_own_generator,
        "starting an iterator draws from the default generator, which on a CPU is also that of dropout: a resumed run "
        "would differ",
    ),
    Patch(
        "megatron.core.dist_checkpointing.strategies.filesystem_async:_results_queue",
        lambda original: queue.Queue(),
        "the first save would start a manager process per rank, which takes half a minute for 8 ranks on 2 cores",
    ),
)


@contextmanager
def seam() -> Iterator[None]:
    """Lets Megatron-Core run on the CPU while entered; without effect where CUDA is available."""
    if torch.cuda.is_available():
        yield
        return
    rng_logger = logging.getLogger("megatron.core.tensor_parallel.random")
    rng_logger.addFilter(_is_news)
    try:
        # upstream compiles its fused functions, at 5 to 17 s a run: on a CPU they run as written
        with applied(PATCHES), torch.compiler.set_stance("force_eager"), _CudaIsCpu():
            yield
    finally:
        rng_logger.removeFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    """Whether to log: not that the CPU's generator changed in a fork of the GPU's, as here they are one."""
    return "CPU RNG state changed within GPU RNG context" not in record.getMessage()

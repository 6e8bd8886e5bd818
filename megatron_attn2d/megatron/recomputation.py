"""What full recomputation keeps of a layer, and where.

Megatron's full recomputation keeps each layer's input on the GPU and computes the whole layer anew in the backward
pass. Two switches change that:

- `--offload-activations` lets what is kept wait in the host's memory (`host_store`). Upstream's two kinds of offload
  can't: `cpu_offloading` is refused together with recomputation, and `fine_grained_activation_offloading` hands over
  what modules save for their backward pass, of which a recomputed layer saves nothing.
- `--keep-attention-outputs` keeps attention's output and log-sum-exp too, as large as the layer's input. Attention's
  forward pass then runs once: at a million tokens that is a fifth of the step.

Both wrap `tensor_parallel.checkpoint`, through which Megatron recomputes layers.
"""

from __future__ import annotations

import functools
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from megatron_attn2d.megatron.host_store import Bundle, HostStore
from megatron_attn2d.megatron.upstream.patching import Patch, applied

_recomputed: list[Attentions] = []
"""The layers that are computed now, for the first or the second time; attention is in the last one."""


_stores: list[HostStore] = []
"""Where activations wait now."""


def attentions() -> Attentions | None:
    """What the layer that is computed now keeps of its attention; None where nothing is kept."""
    return _recomputed[-1] if _recomputed else None


@contextmanager
def keeping(args: Namespace) -> Iterator[None]:
    """While entered, full recomputation keeps what `args` asks for, and where."""
    if not (args.offload_activations or args.keep_attention_outputs):
        yield
        return
    store = HostStore() if args.offload_activations else None
    wrap = functools.partial(_keeping, store=store, attention=args.keep_attention_outputs)
    reason = "it keeps a layer's input on the GPU, and computes attention's output twice"
    with ExitStack() as stack:
        if store is not None:
            _stores.append(store)
            stack.callback(_stores.remove, store)
        stack.enter_context(applied([Patch("megatron.core.tensor_parallel:checkpoint", wrap, reason)]))
        yield


def host_bytes() -> int:
    """What this process has taken of the host's memory for activations."""
    return sum(store.bytes for store in _stores)


class Attentions:
    """The outputs and log-sum-exps of the attention calls in a recomputed piece, in their order."""

    def __init__(self, bundle: Bundle | None) -> None:
        self._bundle = bundle
        self._kept: deque[tuple[Any, Any]] = deque()
        self.complete = False
        """Whether the first pass has ended."""

    def store(self, out: Tensor, lse: Tensor) -> None:
        """Keep what the first pass has computed."""
        self._kept.append((out, lse) if self._bundle is None else (self._bundle.put(out), self._bundle.put(lse)))

    def load(self) -> tuple[Tensor, Tensor] | None:
        """What the first pass has computed, in the second one; None in the first."""
        if not self.complete:
            return None
        out, lse = self._kept.popleft()
        return (out, lse) if self._bundle is None else (self._bundle.take(out), self._bundle.take(lse))


def _keeping(checkpoint: Any, *, store: HostStore | None, attention: bool) -> Any:
    @functools.wraps(checkpoint)
    def keep(function: Callable[..., Any], distribute_saved_activations: bool, *args: Any) -> Any:
        bundle = None if store is None else store.bundle()
        kept = Attentions(bundle) if attention else None

        def run(*args: Any) -> Any:
            with _entered(kept):
                return function(*args)

        with nullcontext() if bundle is None else _in_bundle(args[0], bundle):
            return checkpoint(run, distribute_saved_activations, *args)

    return keep


@contextmanager
def _entered(kept: Attentions | None) -> Iterator[None]:
    if kept is None:
        yield
        return
    _recomputed.append(kept)
    try:
        yield
    finally:
        _recomputed.pop()
        kept.complete = True


def _in_bundle(layer_input: Tensor, bundle: Bundle) -> AbstractContextManager[None]:
    """While entered, autograd saves `layer_input` in `bundle`, and every other tensor as it does.

    Others are the tables of positions, which all layers share.
    """

    its_own = layer_input.data_ptr(), layer_input.shape  # not the tensor itself, which would stay alive with the hooks

    def pack(saved: Tensor) -> Tensor | int:
        return bundle.put(saved) if (saved.data_ptr(), saved.shape) == its_own else saved

    def unpack(packed: Tensor | int) -> Tensor:
        return packed if isinstance(packed, Tensor) else bundle.take(packed)

    return saved_tensors_hooks(pack, unpack)

"""Megatron's CUDA graphs with our attention in them: where they can run, and how they go before process groups do.

    cuda_graph_impl       one graph holds                             training.cuda_graphs
    local                 one pass of a layer                         layer
    transformer_engine    one pass of a layer's attention             attention
    full_iteration        all passes of a step but the optimizer's    iteration

A graph with attention in it holds the communicators of its messages, and NCCL destroys no communicator before the last
such graph has gone: ranks that destroy their process groups first wait for ever. Megatron deletes graphs of Transformer
Engine when training ends in peace, and keeps all others.
"""

from __future__ import annotations

import atexit
import gc
import os
from functools import cache

import torch
from megatron.core.transformer.enums import CudaGraphModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_attn2d.megatron.upstream.graph_environment import graph_fault


def hold_attention(config: TransformerConfig) -> bool:
    """Whether Megatron captures attention under this configuration."""
    modules = config.cuda_graph_modules or []
    return config.cuda_graph_impl != "none" and (not modules or CudaGraphModule.attn in modules)


def prepare(config: TransformerConfig) -> None:
    """See that graphs can hold attention here, and that they go when the process ends, whoever has launched it.

    Raises:
        ValueError: under environment variables with which ranks would hang.
    """
    if fault := graph_fault(os.environ):
        raise ValueError(f"cuda_graph_impl {config.cuda_graph_impl!r} around attention: {'; '.join(fault)}")
    _delete_at_exit()


@cache  # registers once
def _delete_at_exit() -> None:
    atexit.register(delete)


def delete() -> None:
    """Destroy every CUDA graph of this process; to be called before process groups are destroyed.

    Megatron keeps no list of its graphs, so they are looked for among all objects.
    """
    if torch.cuda.is_initialized():
        for found in gc.get_objects():
            if issubclass(type(found), torch.cuda.CUDAGraph):  # not isinstance(), which asks proxies of other objects
                found.reset()


def forget() -> None:
    """Let Megatron's bookkeeping of graphs, which outlives a run, begin anew; call it after `delete`."""
    from megatron.core.full_cuda_graph import FullCudaGraphWrapper, StaticBufferLoader
    from megatron.core.transformer.cuda_graphs import delete_cuda_graphs

    if torch.cuda.is_initialized():
        delete_cuda_graphs()
        FullCudaGraphWrapper(None).reset_cuda_graph()
        for buffers in StaticBufferLoader.static_buffers.values():
            buffers.clear()

"""Torch's norm for models without Apex and Transformer Engine, also under sequence parallelism."""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig

__all__ = ["HAVE_TE", "SequenceParallelTorchNorm"]


class SequenceParallelTorchNorm:
    """Builds torch's norm, as upstream does without Apex and Transformer Engine, also under sequence parallelism.

    Upstream's wrapper refuses that, since nothing marks the parameters of torch's norm for the summation of their
    gradients over the tensor-parallel ranks, which see different tokens. Here they carry that mark.
    """

    def __new__(cls, config: TransformerConfig, *args: Any, **kwargs: Any) -> Any:
        """The norm, constructed with the arguments of upstream's `WrappedTorchNorm`."""
        without = copy.copy(config)
        without.sequence_parallel = False
        norm = WrappedTorchNorm(without, *args, **kwargs)
        assert isinstance(norm, torch.nn.Module)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm

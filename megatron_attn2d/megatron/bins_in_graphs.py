"""What upstream's CUDA graphs ask of a batch whose documents are bins (`megatron/document_bins.py`)."""

from __future__ import annotations

import functools
from argparse import Namespace
from typing import Any

import torch

from megatron_attn2d.megatron import cuda_graphs, document_bins
from megatron_attn2d.megatron.upstream import rotary
from megatron_attn2d.megatron.upstream.patching import Patch


def patches(args: Namespace) -> tuple[Patch, ...]:
    """What holds while a model trains with Megatron's `args` on documents in bins."""

    def with_bins(static_inputs: Any) -> Any:
        @functools.wraps(static_inputs)
        def inputs(layer: Any, seq_length: int, micro_batch_size: int) -> dict[str, torch.Tensor]:
            tokens = seq_length * micro_batch_size  # samples go one after the other
            found: dict[str, torch.Tensor] = static_inputs(layer, tokens, 1)
            if cuda_graphs.hold_attention(layer.config):
                count = args.micro_batch_size * args.document_bins  # known once there are data sets
                found["attention_mask"] = document_bins.of_one(tokens, count, torch.cuda.current_device())
            return found

        return inputs

    def counted(consume: Any) -> Any:
        @functools.wraps(consume)
        def read() -> Any:
            from megatron.training import training

            training._seqlen_stats_active |= training._seqlen_stats_in_iteration is not None
            return consume()

        return read

    found = [*rotary.PATCHES]
    if args.cuda_graph_impl == "transformer_engine":
        found += [
            Patch(
                "megatron.core.transformer.transformer_layer:TransformerLayer.get_layer_static_inputs",
                with_bins,
                "a graph of Transformer Engine has the inputs that it was captured with, and no others",
            ),
            Patch(
                "megatron.core.transformer.cuda_graphs:TECudaGraphHelper._get_sample_arguments",
                _with_own_angles,
                "the graphs of all micro-batches would share the angles: one in flight would lose its own",
            ),
        ]
    if args.cuda_graph_impl == "full_iteration":
        found.append(
            Patch(
                "megatron.training.training:consume_seqlen_stats_in_iteration",
                counted,
                "replays add up the lengths of documents, without the call that tells upstream to look",
            )
        )
    return tuple(found)


def _with_own_angles(sample_arguments: Any) -> Any:
    """`_get_sample_arguments` whose inputs have rotary angles of their own, where micro-batches are in flight."""

    @functools.wraps(sample_arguments)
    def arguments(self: Any, *args: Any, **kwargs: Any) -> Any:
        positional, keywords = sample_arguments(self, *args, **kwargs)
        if self.num_microbatches > 1:
            for one in {id(inputs): inputs for inputs in keywords}.values():
                if "rotary_pos_emb" in one:
                    one["rotary_pos_emb"] = one["rotary_pos_emb"].clone()
        return positional, keywords

    return arguments

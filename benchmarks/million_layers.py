"""The ranks of benchmark_million.py: one layer of Megatron's after another, forward and backward as in a long step.

    python benchmarks/million_layers.py LAYERS.json ROWS.jsonl FIRST

LAYERS.json holds the arguments and the cases, FIRST is the case to begin with. Rank 0 appends an object per line to
ROWS.jsonl, as `watched.Watched` reads it.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from argparse import Namespace
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from attention_modes import spawn
from attention_timing import slowest
from cases import Attempt, run_cases, told
from faked_world import as_first_rank

from megatron_attn2d.megatron.recomputation import keeping
from megatron_attn2d.megatron.upstream import compat, cpu
from megatron_attn2d.training.chunked_loss import linear_cross_entropy


def main() -> None:
    """Start the ranks."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # as in training: see configs/clusters/gpu.yaml
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    given = json.loads(Path(sys.argv[1]).read_text())
    args = Namespace(**given, rows=Path(sys.argv[2]), first=int(sys.argv[3]), nodes=False)
    (as_first_rank if args.faked else spawn)(run_rank, args)


def run_rank(rank: int, args: Namespace) -> None:
    """All cases on one rank."""
    with ExitStack() as stack:
        stack.enter_context(compat.applied_fixes())
        stack.enter_context(cpu.seam())
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

        parallel_state.initialize_model_parallel(context_parallel_size=args.ranks)
        stack.callback(parallel_state.destroy_model_parallel)
        model_parallel_cuda_manual_seed(1)
        for _ in run_cases(args, lambda case: attempt(case, args)):
            pass


def attempt(case: dict[str, Any], args: Namespace) -> Attempt:
    """What was measured, or why not."""
    try:
        return (loss if case["mode"] == "loss" else layer)(case, args), ""
    except Exception as error:
        return {}, told(error)
    finally:
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()


def layer(case: dict[str, Any], args: Namespace) -> dict[str, float]:
    """Seconds and memory of one recomputed layer of the model in the mode of `case`."""
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from megatron.core.transformer.transformer_block import TransformerBlock

    from megatron_attn2d.megatron.layer_spec import attention2d_layer_spec

    config = transformer_config(case["mode"], args)
    block = TransformerBlock(config, attention2d_layer_spec(config), post_layer_norm=False).to(device(args))
    rotary = RotaryEmbedding(config.kv_channels, 1.0, rotary_base=args.model["rotary_base"])
    positions = rotary(case["seq"])
    shape = case["seq"] // args.ranks, 1, config.hidden_size
    dout = torch.randn(shape, device=device(args), dtype=config.params_dtype)
    given = Namespace(offload_activations=case["kept"], keep_attention_outputs=case["kept"])
    found: list[tuple[float, float]] = []
    with keeping(given):
        for _ in range(1 + args.repeats):
            x = torch.randn(shape, device=device(args), dtype=config.params_dtype).requires_grad_()
            start_peak(args)
            begin = now(args)
            # A piece of the graph before the layer, so that its input may leave the GPU.
            out = block(hidden_states=x * 1, attention_mask=None, rotary_pos_emb=positions)
            middle = now(args)
            out.backward(dout)
            end = now(args)
            peak = peak_gib(args)
            found.append((middle - begin, end - middle))
            for parameter in block.parameters():
                parameter.grad = None
            del x, out
    forward, backward = min(found[1:] or found, key=sum)
    return {
        "forward_s": slowest(forward, device(args)),
        "backward_s": slowest(backward, device(args)),
        "first_s": slowest(sum(found[0]), device(args)),
        "peak_gib": slowest(peak, device(args)),
    }


def loss(case: dict[str, Any], args: Namespace) -> dict[str, float]:
    """Seconds and memory of the output layer and the loss in chunks, forward and backward."""
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    tokens, hidden, vocabulary = case["seq"] // args.ranks, args.model["hidden_size"], args.model["vocab_size"]
    x, weight = (
        torch.randn(n, hidden, device=device(args), dtype=dtype).requires_grad_() for n in (tokens, vocabulary)
    )
    labels = torch.randint(vocabulary, (tokens,), device=device(args))
    seconds = []
    for _ in range(2):
        start_peak(args)
        begin = now(args)
        linear_cross_entropy(x, weight, labels, chunk=args.chunk).sum().backward()
        seconds.append(now(args) - begin)
        x.grad = weight.grad = None
    return {"total_s": slowest(seconds[-1], device(args)), "peak_gib": slowest(peak_gib(args), device(args))}


def transformer_config(mode: str, args: Namespace) -> Any:
    """Megatron's configuration of one layer of the model, wholly recomputed."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_attn2d.megatron.layer_spec import HAVE_TE

    model = args.model
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    return TransformerConfig(
        num_layers=1,
        hidden_size=model["hidden_size"],
        ffn_hidden_size=model["ffn_hidden_size"],
        num_attention_heads=model["num_attention_heads"],
        num_query_groups=model["num_query_groups"],
        qk_layernorm=model["qk_layernorm"],
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=True,
        bias_dropout_fusion=True,
        apply_rope_fusion=HAVE_TE,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        context_parallel_size=args.ranks,
        cp_comm_type=mode,
        transformer_impl="transformer_engine" if HAVE_TE else "local",
        recompute_granularity="full",
        recompute_method="uniform",
        recompute_num_layers=1,
    )


def device(args: Namespace) -> str:
    """Where this rank's tensors are."""
    return str(args.device)


def now(args: Namespace) -> float:
    """The time, once all ranks have done what was queued."""
    if args.device == "cuda":
        torch.cuda.synchronize()
    dist.barrier()
    return time.perf_counter()


def start_peak(args: Namespace) -> None:
    """Forget what was allocated at most."""
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_gib(args: Namespace) -> float:
    """What was allocated on this rank's GPU at most since `start_peak`; 0 on CPU ranks."""
    return torch.cuda.max_memory_allocated() / 2**30 if args.device == "cuda" else 0.0


if __name__ == "__main__":
    main()

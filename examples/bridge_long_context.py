#!/usr/bin/env python3
"""A Llama of Hugging Face's, from a local folder, trained on at a longer context with attention2d, and written back.

    pip install megatron-bridge
    torchrun --nproc-per-node 8 examples/bridge_long_context.py llama-8b/ llama-8b-128k/ --data corpus/tokens

Megatron-Bridge reads the folder, trains and writes the new one, which `AutoModelForCausalLM.from_pretrained` loads. Two
fields of its model provider bring attention2d in. The data set holds token ids, as `megatron-attn2d data build` or
Megatron-LM writes them; without `--data` the tokens are made up.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


def described(bridge: Any, args: argparse.Namespace, ranks: int) -> Any:
    """Bridge's provider of the model, with attention2d over the ranks that tensor parallelism leaves."""
    from megatron_attn2d import attention2d_layer_spec

    known = bridge.hf_pretrained.config  # is written back, too
    known.max_position_embeddings = args.length
    known.rope_parameters["rope_theta"] = args.rotary_base or known.rope_parameters["rope_theta"]
    provider = bridge.to_megatron_provider()
    provider.seq_length = args.length
    provider.tensor_model_parallel_size, provider.sequence_parallel = args.tensor, args.tensor > 1
    provider.context_parallel_size = ranks // args.tensor
    provider.transformer_layer_spec = attention2d_layer_spec
    provider.cp_comm_type = f"attention2d:{args.grid}" if args.grid else "attention2d"
    provider.calculate_per_token_loss = True
    # Keeps one activation per layer and computes the others again.
    provider.recompute_granularity, provider.recompute_method, provider.recompute_num_layers = "full", "uniform", 1
    return provider


def settings(provider: Any, args: argparse.Namespace) -> Any:
    """Bridge's description of the training."""
    from megatron.bridge.training import config
    from megatron.core.distributed import DistributedDataParallelConfig

    saved = {"save": str(args.save), "save_interval": args.steps} if args.save else {}
    return config.ConfigContainer(
        model=provider,
        train=config.TrainingConfig(train_iters=args.steps, global_batch_size=args.batch, micro_batch_size=1),
        validation=config.ValidationConfig(eval_interval=args.steps + 1, eval_iters=0),
        optimizer=config.OptimizerConfig(
            optimizer="adam", lr=args.lr, min_lr=args.lr, use_distributed_optimizer=True, bf16=True
        ),
        scheduler=config.SchedulerConfig(
            lr_decay_style="constant", lr_warmup_iters=0, start_weight_decay=0.1, end_weight_decay=0.1
        ),
        ddp=DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True),
        dataset=config.GPTDatasetConfig(
            seq_length=args.length,
            data_path=args.data,
            random_seed=1,
            reset_attention_mask=False,
            reset_position_ids=False,
            eod_mask_loss=False,
            dataloader_type="single",
        ),
        logger=config.LoggerConfig(log_interval=1),
        tokenizer=config.TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=provider.vocab_size - 1),
        checkpoint=config.CheckpointConfig(**saved),
        rng=config.RNGConfig(seed=1),
        dist=config.DistributedInitConfig(),
        mixed_precision="bf16_mixed",
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Trains as one of torchrun's ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of the model, as Hugging Face writes it")
    parser.add_argument("out", type=Path, help="folder for the trained model")
    parser.add_argument("--data", help="prefix of a .bin and .idx of token ids")
    parser.add_argument("--length", type=int, default=131072, help="tokens per sequence")
    parser.add_argument("--rotary-base", type=float, help="base of RoPE's frequencies; default: the model's")
    parser.add_argument("--grid", help="RxC or UxRxC over the context ranks; default: the one with the fewest bytes")
    parser.add_argument("--tensor", type=int, default=1, help="tensor-parallel ranks; the others are context ranks")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4, help="sequences per step")
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument("--save", type=Path, help="folder for a checkpoint of Megatron's beside the model")
    train(parser.parse_args(argv))


def train(args: argparse.Namespace) -> None:
    """Reads the model, trains it, and writes it back; every rank must call."""
    from megatron.bridge import AutoBridge
    from megatron.bridge.training.callbacks import CallbackManager
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.pretrain import pretrain

    def told(context: Any) -> None:
        if torch.distributed.get_rank() == 0:
            print(f"loss {context.loss_dict['lm loss'].item():.4f}  gradient norm {context.grad_norm:.3f}", flush=True)

    bridge = AutoBridge.from_hf_pretrained(args.model)
    provider = described(bridge, args, int(os.environ["WORLD_SIZE"]))
    events = CallbackManager()
    events.register("on_train_step_end", told)
    events.register(
        "on_train_end", lambda context: bridge.save_hf_pretrained(context.model, args.out, show_progress=False)
    )
    pretrain(settings(provider, args), forward_step, callbacks=events)


if __name__ == "__main__":
    main()

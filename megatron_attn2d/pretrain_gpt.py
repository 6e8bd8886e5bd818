"""`python -m megatron_attn2d.pretrain_gpt`, under torchrun: see `megatron_attn2d.training.pretrain_gpt`."""

import sys

from megatron_attn2d.training.pretrain_gpt import main

__all__ = ["main"]

if __name__ == "__main__":
    main(sys.argv[1:])

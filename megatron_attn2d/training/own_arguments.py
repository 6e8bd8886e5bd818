"""The arguments that this package adds to Megatron's."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import NoReturn

from megatron_attn2d.errors import UsageError


def add_own_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Add them to `parser`, which then raises UsageError for a wrong argument instead of exiting."""
    parser.error = _refuse  # type: ignore[method-assign]  # argparse would print the message into a rank's log
    own = parser.add_argument_group("megatron_attn2d")
    own.add_argument("--run-dir", help="directory for metrics.jsonl and the logs of the ranks")
    own.add_argument("--attention2d-head-groups", type=int, default=1, help="groups of heads that overlap")
    own.add_argument(
        "--document-multiple",
        type=int,
        default=0,
        help="each document is a sequence of its own, padded to a multiple of so many tokens; 0: all are one",
    )
    own.add_argument(
        "--document-bins",
        type=int,
        default=0,
        help="tell attention of so many documents per sample; 0: as many as the fullest in CUDA graphs, else as come",
    )
    own.add_argument(
        "--examples", action="store_true", help="data sets hold examples of fine-tuning, which are not cut"
    )
    own.add_argument("--keep-last", type=int, help="checkpoints to keep; default: all")
    own.add_argument("--peak-tflops", type=float, help="of a GPU, in 10^12 FLOP/s, for the MFU")
    own.add_argument("--log-attention-communication", action="store_true", help="measure waiting for its messages")
    own.add_argument("--loss-chunk-tokens", type=int, help="tokens whose logits exist at a time; default: all")
    own.add_argument("--offload-activations", action="store_true", help="full recomputation keeps on the host")
    own.add_argument("--keep-attention-outputs", action="store_true", help="full recomputation runs attention once")
    own.add_argument("--check-finite-attention", action="store_true", help="report NaN and Inf with layer and rank")
    own.add_argument(
        "--no-attention-self-check",
        action="store_false",
        dest="attention_self_check",
        help="start without comparing a tiny attention with the dense answer",
    )
    return parser


def _refuse(message: str) -> NoReturn:
    raise UsageError(f"Megatron's arguments: {message}")

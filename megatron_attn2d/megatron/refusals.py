"""What of Megatron's is refused, in one table: with it, attention would be another than asked for, or would ignore it.

Each way in tells it in its own words: the `megatron_args` of a YAML, the command line of a rank, and the modules, which
any launcher builds. What is refused only beside something else stands where both are known.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Refusal(NamedTuple):
    """Why an argument is refused, as the predicate of a sentence about it, and what to do instead."""

    reason: str
    choice: str = "leave it out"
    value: str | None = None
    """The value that is refused; None: any that switches it on."""


_GROUPS = Refusal("changes the context-parallel group with every batch, and a grid is laid once")
_SCORES = Refusal("needs the largest score, which our attention does not report yet")
_FP8 = Refusal("asks for attention in FP8, and ours computes in bf16", "leave it out; FP8 in linear layers is fine")
REFUSED = {
    "attention_backend": Refusal(
        "makes Megatron replace context-parallel attention by its own, which sees the tokens of one rank only",
        "choose auto, flash, fused or unfused",
        value="local",
    ),
    "hybrid_context_parallel": _GROUPS,
    "dynamic_context_parallel": _GROUPS,
    "max_seqlen_per_dp_cp_rank": _GROUPS,
    "attention_cp_layout": Refusal(
        "deals out other tokens than the zigzag, by which attention masks", "choose zigzag", value="contiguous"
    ),
    "qk_clip": _SCORES,
    "log_max_attention_logit": _SCORES,
    "fp8_dot_product_attention": _FP8,
    "fp8_multi_head_attention": _FP8,
    "batch_invariant_mode": Refusal("is about kernels of Megatron's own attention", "choose deterministic_mode"),
    "reset_attention_mask": Refusal(
        "makes a mask of all tokens, which no attention over context ranks reads",
        "choose data.document_masking, or packed sequences (cu_seqlens), which do what it is for",
    ),
    "dataloader_inter_document_masking": Refusal(
        "packs documents that don't divide over context ranks",
        "choose data.document_masking, which packs documents that do",
    ),
    "sft": Refusal("packs conversations as our loader of data does not", "choose data.format=sft"),
    "yaml_cfg": Refusal("discards all other arguments"),
}
"""By the names under which Megatron stores its arguments and the fields of its TransformerConfig."""


def refusal(name: str, value: object) -> Refusal | None:
    """Why the argument `name` is refused with `value`, which may be an enumeration's; None where it is not."""
    found = REFUSED.get(name)
    if found is None or value is None or value is False:
        return None
    return found if found.value in (None, str(getattr(value, "name", value))) else None


def check_model(config: Any) -> None:
    """Refuses a TransformerConfig with what the table holds.

    Raises:
        ValueError: names the field.
    """
    for name in REFUSED:
        if found := refusal(name, getattr(config, name, None)):
            what = name if found.value is None else f"{name} {found.value}"
            told = f"{what} is not supported by context-parallel attention: it {found.reason}; {found.choice}"
            raise ValueError(told)

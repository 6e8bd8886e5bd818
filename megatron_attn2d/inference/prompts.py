"""What can be asked of a model: prompts of its tokenizer's tokens, no longer than its positions."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_attn2d.config import RunConfig
from megatron_attn2d.errors import UsageError
from megatron_attn2d.inference.text import Tokenizer


def check_tokens(what: str, tokens: Sequence[int], cached: int, new: int, tokenizer: Tokenizer, run: RunConfig) -> None:
    """Raise UsageError unless `tokens`, called `what`, can follow `cached` others, and `new` can follow them."""
    if not len(tokens):
        raise UsageError(f"{what}: empty; give a token, such as {tokenizer.end}, which ends documents")
    if not 0 <= min(tokens) <= max(tokens) < tokenizer.size:
        raise UsageError(
            f"{what}: token {max(tokens) if min(tokens) >= 0 else min(tokens)} is none of the run's tokenizer "
            f"({run.data.tokenizer_type}), whose tokens are 0 to {tokenizer.size - 1}"
        )
    positions = positions_of(run)
    # The last token that is chosen is not computed again.
    if positions is not None and cached + len(tokens) + max(0, new - 1) > positions:
        before = f"{cached:,} cached and " if cached else ""
        after = f" and {new:,} new ones" if new else ""
        raise UsageError(
            f"{what}: {before}{len(tokens):,} tokens{after} are more than the {positions:,} positions that the run has "
            "learned; give a shorter prompt or fewer new tokens"
        )


def positions_of(run: RunConfig) -> int | None:
    """The longest text in tokens, where positions were learned; None where there is no end."""
    learned = run.model.position_embedding_type == "learned_absolute"
    return run.model.max_position_embeddings if learned else None

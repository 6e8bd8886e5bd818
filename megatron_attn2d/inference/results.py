"""What generation hands over: completions, and how fast they came."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

StopReason = Literal["length", "end", "stop"]


@dataclass(frozen=True)
class Completion:
    """What follows a prompt."""

    text: str
    """As it reads behind the prompt; without the stop text that ended it."""
    tokens: list[int]
    """As they were chosen, a stop text's included, the end-of-document token not."""
    logprobs: list[float]
    """Natural logarithm of each token's probability, before temperature, top-k and top-p."""
    stop_reason: StopReason
    """length: max_tokens were chosen. end: the model ended the document. stop: a stop text came."""


@dataclass
class Measured:
    """What this replica has generated, and how fast."""

    ranks: int
    """Context ranks over which keys and values are spread."""
    replicas: int = 1
    prompt_tokens: int = 0
    prompt_s: float = 0.0
    """Until the first new token of the prompts was known."""
    new_tokens: int = 0
    """Without the first of each prompt."""
    new_s: float = 0.0
    cache_bytes: int = 0
    """Of keys and values, on this rank, at most."""

    def sentence(self) -> str:
        """In words."""
        speed = f"{self.new_tokens / self.new_s:,.1f} new tokens per s" if self.new_tokens else "no second token"
        return (
            f"{self.prompt_tokens:,} tokens of prompts in {self.prompt_s:.2f} s; {speed}; keys and values "
            f"{self.cache_bytes / 2**20:,.3g} MiB on each of {self.ranks} context ranks"
            + (f"; on one of {self.replicas} replicas" if self.replicas > 1 else "")
        )

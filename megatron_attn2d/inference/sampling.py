"""Which token comes next: the most likely one, or one drawn by temperature, top-k and top-p."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and when a text ends.

    Raises:
        ValueError: a value is out of range; names it and a valid choice.
    """

    max_tokens: int = 64
    """Tokens of a completion at most."""
    temperature: float = 0.0
    """0: the most likely token, always. Higher: drawn from the softmax of the logits over the temperature."""
    top_p: float = 1.0
    """Draw among the fewest tokens whose probabilities sum to this; 1: among all."""
    top_k: int = 0
    """Draw among so many most likely tokens; 0: among all."""
    seed: int = 0
    """Of the draws. A prompt draws by the seed and its place among the prompts, whatever the layout of ranks."""
    stop: tuple[str, ...] = ()
    """A completion ends before the first of these texts."""
    ignore_end: bool = False
    """Go on after the tokenizer's end-of-document token; for measurements."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens {self.max_tokens}: choose 1 or more")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature {self.temperature}: choose 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p}: choose more than 0, up to 1")
        if self.top_k < 0:
            raise ValueError(f"top_k {self.top_k}: choose 0 (all tokens) or more")
        if "" in self.stop:
            raise ValueError("stop '': an empty text would end every completion; leave it out")


def choose(logits: Tensor, sampling: Sampling, generators: list[torch.Generator]) -> Tensor:
    """The next token of each row of logits [b, vocabulary], [b] int64; row i draws from `generators[i]`."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    scores = logits.float() / sampling.temperature
    if 0 < sampling.top_k < scores.size(-1):
        highest = scores.topk(sampling.top_k)  # by their places: in bf16 several may be as likely as the last of them
        scores = torch.full_like(scores, -torch.inf).scatter(-1, highest.indices, highest.values)
    probabilities = scores.softmax(-1)
    if sampling.top_p < 1:
        ordered, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
        beyond = ordered.cumsum(-1) - ordered >= sampling.top_p  # the first token always stays
        probabilities = probabilities.masked_fill(beyond.scatter(-1, tokens, beyond), 0)
    drawn = [
        torch.multinomial(row, 1, generator=generator) for row, generator in zip(probabilities, generators, strict=True)
    ]
    return torch.cat(drawn)


def generators_of(sampling: Sampling, places: Sequence[int], device: torch.device) -> list[torch.Generator]:
    """A generator of random numbers for each prompt, by its place among all."""
    seeds = [(sampling.seed * 1_000_003 + place) % 2**63 for place in places]
    return [torch.Generator(device).manual_seed(seed) for seed in seeds]

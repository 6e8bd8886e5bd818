"""One more token of each sequence: the step that generation repeats, on GPUs as one CUDA graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from megatron_attn2d.inference import shards
from megatron_attn2d.inference.cache import Cache
from megatron_attn2d.inference.model import Model
from megatron_attn2d.inference.passes import Decode

Graph = Literal["auto", "always", "never"]
_WORTH = 64
"""Tokens from which on capturing a graph is worth its seconds."""
_WARM_UP = 2


class Decoder:
    """Adds tokens to the sequences of a cache, one each at a time."""

    def __init__(self, model: Model, cache: Cache, tokens: int, graph: Graph) -> None:
        """For up to `tokens` steps, after which the cache may be filled or rolled back again, with another decoder.

        The cache must have room for them (`Cache.grow`).

        Raises:
            ValueError: `graph` is "always" and the model can't be captured; says why.
        """
        self._model, self._cache = model, cache
        count = len(cache.lengths)
        self._tokens = torch.zeros(count, dtype=torch.long, device=model.device)
        self._active = torch.zeros(count, dtype=torch.bool, device=model.device)
        self._rows = torch.arange(count, device=model.device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None
        needed = shards.capacity([0] * count, tokens, 1, cache.ranks, cache.filled)
        assert needed <= cache.capacity, f"room for {needed} tokens of a sequence, there is {cache.capacity}"
        refusal = model.graph_refusal
        if graph == "always" and refusal is not None:
            raise ValueError(f"a CUDA graph of the decode step: {refusal}; choose graph='auto' or 'never'")
        if graph == "always" or (graph == "auto" and refusal is None and tokens >= _WORTH):
            self._capture()

    @property
    def captured(self) -> bool:
        """Whether a step is the replay of a CUDA graph."""
        return self._graph is not None

    def step(self, tokens: Sequence[int] | Tensor, active: Sequence[bool]) -> Tensor | None:
        """Adds a token to each active sequence, and computes what `Model.logits` does of it, [B, vocabulary].

        What the last step returned is overwritten.
        """
        self._tokens.copy_(torch.as_tensor(tokens))
        self._active.copy_(torch.as_tensor(active))
        if self._graph is None:
            self._logits = self._run()
        else:
            self._graph.replay()
        self._cache.count_decoded(active)
        self._cache.logits = self._logits
        return self._logits

    def _run(self) -> Tensor | None:
        logits = self._forward()
        self._cache.finish()
        return logits

    def _forward(self) -> Tensor | None:
        step = self._cache.begin(Decode(self._cache, self._active))
        return self._model.logits(self._cache, self._tokens, step.positions, self._rows)

    def _capture(self) -> None:
        # Nothing counts as long as no pass is finished: runs to warm up write where the first step will write again.
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(_WARM_UP):
                self._forward()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL's watchdog goes on meanwhile
            self._logits = self._run()
        self._graph = graph
        self._model.graphs.append(graph)

    def close(self) -> None:
        """Lets go of the graph, whose memory another one may then take."""
        if self._graph is not None:
            torch.cuda.synchronize()
            self._model.graphs.remove(self._graph)
            self._graph.reset()
            self._graph = None

"""Text from a run's checkpoint, on the ranks that trained it or on others: the Python API.

    from megatron_attn2d.inference import Generator, Sampling

    with Generator.load("runs/mine") as generator:                       # in every rank, as torchrun starts them
        (text,) = generator.generate(["Once upon"], Sampling(max_tokens=20))

Every rank calls every function with the same arguments and gets the same answers. Prompts are filled in by chunks with
attention2d, keys and values stay spread over the context ranks, and tokens are chosen one after the other (`cache`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TextIO, cast

import torch
from torch import Tensor

from megatron_attn2d.config import RunConfig
from megatron_attn2d.errors import UsageError
from megatron_attn2d.inference import configuration
from megatron_attn2d.inference.prompts import check_tokens, positions_of
from megatron_attn2d.inference.results import Completion, Measured, StopReason
from megatron_attn2d.inference.sampling import Sampling, choose, generators_of
from megatron_attn2d.inference.text import TextStream, Tokenizer
from megatron_attn2d.launch import environment, ranks
from megatron_attn2d.run import checkpoints
from megatron_attn2d.training import session

if TYPE_CHECKING:  # they import Megatron, whose greeting is for the log
    from megatron_attn2d.inference.cache import Cache
    from megatron_attn2d.inference.decode import Decoder, Graph
    from megatron_attn2d.inference.model import Model
    from megatron_attn2d.inference.room import Room

Tokens = Sequence[int]


class Generator:
    """A model that continues prompts and scores texts; a context manager, which frees the ranks' groups.

    Attributes:
        tokenizer: the run's, with encode(text) and decode(tokens).
        run: how the model was loaded.
        console: where to print; what Megatron prints goes to the logs in RUN_DIR/logs.
        positions: the longest text in tokens, where positions were learned; None where there is no end.
        replica: which of the data-parallel replicas this rank is in, from 0 on.
        replicas: how many there are.
        measured: by `generate`, since the generator was made.
    """

    def __init__(
        self,
        run: RunConfig,
        model: Model,
        room: Room,
        tokenizer: Tokenizer,
        console: TextIO,
        batch: int,
        chunk: int,
        graph: Graph,
    ) -> None:
        """Use `load`, or `started` inside Megatron's ranks."""
        self.run, self.tokenizer, self.console = run, tokenizer, console
        self._model, self._room, self._batch, self._chunk, self._graph = model, room, batch, chunk, graph
        self._stack = ExitStack()
        self.positions = positions_of(run)
        self.replica, self.replicas = model.replica
        self.measured = Measured(run.context_parallel.size, self.replicas)

    @classmethod
    def load(
        cls,
        run_dir: str | Path,
        overrides: Sequence[str] = (),
        *,
        step: int | None = None,
        batch: int = 8,
        chunk: int = 4096,
        graph: Graph = "auto",
    ) -> Self:
        """The model of a run's checkpoint, as this rank of those that a launcher started; alone, on one rank.

        Args:
            run_dir: the run's directory.
            overrides: `key.sub=value`, of another layout of ranks than the run's say: parallelism.*,
                context_parallel.*. Without a launcher they must leave one rank.
            step: of the checkpoint; None: the last complete one.
            batch: prompts that are completed at once, on each replica.
            chunk: tokens that a rank computes at once while prompts are filled in.
            graph: whether a step after the prompts is a CUDA graph: auto, where it can be and is worth it; always;
                never.

        Raises:
            UsageError: there is no such checkpoint, or an override does not fit it.
        """
        world_size = environment.launched_world_size()
        run = configuration.configuration(Path(run_dir), list(overrides), world_size)
        if world_size is None and run.world_size > 1:
            raise UsageError(
                f"{run_dir} takes {run.world_size} ranks, and this process is alone: start it with torchrun, or "
                "override parallelism.* and context_parallel.* so that one is left"
            )
        step = checkpoints.chosen(Path(run_dir) / "checkpoints", step)
        environment.apply_variables(run.environment.device, run.environment.variables)
        if world_size:
            environment.adopt_launcher()
        else:
            ranks.alone()
        stack = ExitStack()
        generator = stack.enter_context(
            cls.started(run, configuration.arguments(run, step), batch=batch, chunk=chunk, graph=graph)
        )
        generator._stack = stack
        return generator

    @classmethod
    @contextmanager
    def started(
        cls, run: RunConfig, arguments: Sequence[str], *, batch: int = 8, chunk: int = 4096, graph: Graph = "auto"
    ) -> Iterator[Self]:
        """The model in this rank, RANK, WORLD_SIZE, ... being in its environment; other arguments are those of `load`.

        Args:
            run: of `configuration.configuration`.
            arguments: Megatron's, of `configuration.arguments`.
            batch: as of `load`.
            chunk: as of `load`.
            graph: as of `load`.
        """
        for name, value in (("batch", batch), ("chunk", chunk)):
            if value < 1:
                raise UsageError(f"{name} {value}: choose 1 or more")
        tokenizer = Tokenizer(run.data)
        with session.in_megatron(arguments) as console:
            from megatron_attn2d.inference.model import Model
            from megatron_attn2d.inference.room import Room

            model = Model.built()
            room = Room(model, chunk, run.context_parallel.size)
            try:
                yield cls(run, model, room, tokenizer, console, batch, chunk, graph)
            finally:
                model.close()

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Ends Megatron in this rank."""
        self.close()

    def close(self) -> None:
        """Ends Megatron in this rank; the generator can't be used any more."""
        self._stack.close()

    def generate(
        self,
        prompts: Sequence[str] | Sequence[Tokens],
        sampling: Sampling | None = None,
        on_text: Callable[[int, str], None] | None = None,
        *,
        on_completion: Callable[[int, Completion], None] | None = None,
        after: Cache | None = None,
        shared: bool = True,
    ) -> list[Completion]:
        """Completes each prompt.

        Args:
            prompts: texts, or their tokens; of unequal lengths as they come.
            sampling: how tokens are chosen; greedily, 64 of them, by default.
            on_text: is called with a prompt's place and the text that has come, on every rank of its replica.
            on_completion: is called with a prompt's place and its completion, on every rank and in the order of the
                prompts, each time that a batch of every replica is complete.
            after: a text that stands before each prompt, in a cache of one sequence (`prefill`). It is as before
                afterwards. The prompts are then completed one after the other.
            shared: whether the replicas share the prompts, and all get all answers; if not this replica completes all
                of its prompts, which may be others than those of the other replicas.

        Raises:
            UsageError: a prompt is empty, holds tokens that are none, or is too long for positions or memory; or
                logits are not finite.
        """
        sampling = sampling or Sampling()
        encode = partial(self.tokenizer.encode, begins=after is None)
        asked = [encode(prompt) if isinstance(prompt, str) else list(prompt) for prompt in prompts]
        cached = 0 if after is None else self._one_sequence(after)
        for i, tokens in enumerate(asked):
            self._check(f"prompt {i}", tokens, cached, sampling.max_tokens)
        rounds = self._rounds(asked, sampling.max_tokens, after, shared)
        completions: list[Completion] = []
        for places in rounds:
            found = self._completed({place: asked[place] for place in places}, sampling, on_text, after)
            gathered = self.gathered(found) if shared else found
            for place in sorted(gathered):
                completions.append(gathered[place])
                if on_completion is not None:
                    on_completion(place, gathered[place])
        return completions

    def gathered(self, found: dict[int, Any]) -> dict[int, Any]:
        """What the replicas have found, by its place among all, together; every rank calls."""
        return self._model.of_all_replicas(found)

    def check_length(self, tokens: int) -> None:
        """Raise UsageError where one text of so many tokens fits neither the learned positions nor the memory."""
        if self.positions is not None and tokens > self.positions:
            raise UsageError(
                f"{tokens:,} tokens are more than the {self.positions:,} positions that the run has learned"
            )
        self._room.check([[tokens]], 0)

    def prefill(self, prompts: Sequence[Tokens], *, room: int = 0) -> Cache:
        """A cache of the prompts' keys and values.

        Args:
            prompts: tokens of each sequence.
            room: tokens that will be added to each; where it is too small the cache grows, which copies it.

        Raises:
            UsageError: as `generate`.
        """
        for i, tokens in enumerate(prompts):
            self._check(f"prompt {i}", tokens, 0, 0)
        cache = self._room.cache(list(map(len, prompts)), room)
        self._extend(cache, prompts)
        return cache

    def extend(self, cache: Cache, tokens: Sequence[Tokens]) -> None:
        """Adds tokens to each sequence of `cache`; then its logits are those after the last of them.

        Raises:
            UsageError: as `generate`.
        """
        for i, (new, cached) in enumerate(zip(tokens, cache.lengths, strict=True)):
            self._check(f"sequence {i}", new, cached, 0)
        self._room.make(cache, list(map(len, tokens)), 0)
        self._extend(cache, tokens)

    def log_likelihood(
        self, contexts: Sequence[Tokens], continuations: Sequence[Tokens], *, after: Cache | None = None
    ) -> list[tuple[float, bool]]:
        """Of each continuation the sum of its tokens' log probabilities, and whether greedy choice would give it.

        Args:
            contexts: what stands before each continuation; at least a token, unless there is `after`.
            continuations: their tokens, at least one each.
            after: a text that stands before each context, in a cache of one sequence; it is as before afterwards.

        Raises:
            UsageError: as `generate`.
        """
        for i, (context, continuation) in enumerate(zip(contexts, continuations, strict=True)):
            follows = bool(context) or after is not None
            if not (continuation and follows):
                which = "continuation" if follows else "context"
                raise UsageError(f"{which} {i}: empty; give at least one token")
        texts = [[*context, *continuation] for context, continuation in zip(contexts, continuations, strict=True)]
        scores = self._scores(texts, after, list(map(len, contexts)))
        return [(float(found[:, 0].sum()), bool(found[:, 1].all())) for found in scores]

    def score(self, texts: Sequence[Tokens], *, shared: bool = True) -> list[list[float]]:
        """The log probability of each token of each text but the first, which nothing stands before.

        Args:
            texts: their tokens.
            shared: as of `generate`.

        Raises:
            UsageError: as `generate`.
        """
        return [scores[:, 0].tolist() for scores in self._scores(texts, None, [1] * len(texts), shared)]

    def _rounds(self, texts: Sequence[Tokens], new: int, after: Cache | None, shared: bool) -> list[list[int]]:
        """The places of this replica's texts, a batch per round; one by one behind a cached text.

        There are as many rounds on all replicas, the last of which may be empty. Round i of all of them is the texts
        from i * batch * replicas on.

        Raises:
            UsageError: a cache of a round, with `new` tokens more per text, would not fit.
        """
        replica, replicas = (self.replica, self.replicas) if shared else (0, 1)
        together = replicas * (self._batch if after is None else 1)
        blocks = [range(begin, min(begin + together, len(texts))) for begin in range(0, len(texts), together)]
        if after is None:
            batches = [[len(texts[place]) for place in block[i::replicas]] for block in blocks for i in range(replicas)]
            self._room.check(filter(None, batches), new)
        else:
            # Not of the longest alone: of a shorter one the last chunk may leave more to the fullest rank.
            for length in sorted({*map(len, texts)}, reverse=True):
                self._room.make(after, [length], new)
        return [list(block[replica::replicas]) for block in blocks]

    def _scores(
        self, texts: Sequence[Tokens], after: Cache | None, first: Sequence[int], shared: bool = True
    ) -> list[Tensor]:
        """Of each text's tokens from the place `first` on: log probability and whether it is the likeliest, [n, 2]."""
        cached = 0 if after is None else self._one_sequence(after)
        for i, tokens in enumerate(texts):
            self._check(f"text {i}", tokens, cached, 0)
        found: dict[int, Tensor] = {}
        for places in self._rounds(texts, 0, after, shared):
            if places:
                scores = self._scored([texts[place] for place in places], [first[place] for place in places], after)
                for place, of_text in zip(places, scores, strict=True):
                    if not of_text[:, 0].isfinite().all():
                        raise UsageError(f"text {place}: {self._not_finite()}")
                    found[place] = of_text
        merged = self.gathered(found) if shared else found
        return [merged[place] for place in range(len(texts))]

    def _scored(self, texts: Sequence[Tokens], first: Sequence[int], after: Cache | None) -> list[Tensor]:
        """`_scores` of one batch."""
        if after is None:
            return self._extend(self._room.cache(list(map(len, texts)), 0), texts, first)
        before = after.snapshot()
        try:
            return self._extend(after, texts, first)
        finally:
            after.roll_back(before)

    def _extend(self, cache: Cache, tokens: Sequence[Tokens], first: Sequence[int] | None = None) -> list[Tensor]:
        """See `fill`."""
        from megatron_attn2d.inference.fill import fill

        return fill(self._model, cache, tokens, self._chunk, first, self.tokenizer.size)

    def _completed(
        self,
        asked: dict[int, list[int]],
        sampling: Sampling,
        on_text: Callable[[int, str], None] | None,
        after: Cache | None,
    ) -> dict[int, Completion]:
        """The completions of one batch of prompts, by place."""
        if not asked:
            return {}
        started = time.perf_counter()
        with ExitStack() as afterwards:
            if after is None:
                cache = self.prefill(list(asked.values()), room=sampling.max_tokens)
            else:
                cache = after
                afterwards.callback(cache.roll_back, cache.snapshot())
                self._extend(cache, list(asked.values()))
            show = on_text or (lambda place, text: None)
            completions = self._complete(cache, asked, sampling, show, started, afterwards)
        self.measured.prompt_tokens += sum(map(len, asked.values()))
        return dict(zip(asked, completions, strict=True))

    def _complete(
        self,
        cache: Cache,
        asked: dict[int, list[int]],
        sampling: Sampling,
        show: Callable[[int, str], None],
        started: float,
        afterwards: ExitStack,
    ) -> list[Completion]:
        """Adds tokens to the sequences of `cache`, which end with the prompts `asked`, until each of them ends.

        The prompts were begun to be filled in at `started`. `afterwards` lets go of the decoder, also after an error.
        """
        from megatron_attn2d.inference.decode import Decoder

        model, places, count = self._model, list(asked), len(asked)
        streams = [TextStream(self.tokenizer.decode, sampling.stop, prompt) for prompt in asked.values()]
        logprobs: list[list[float]] = [[] for _ in places]
        reasons: list[StopReason | None] = [None] * count
        draws = generators_of(sampling, places, model.device)
        logits, first = cache.logits, 0.0
        decoder: Decoder | None = None
        while True:
            chosen = self._chosen(logits, sampling, draws, count)
            first = first or time.perf_counter()  # the tokens are known here: the GPU has done all before
            for i, (token, logprob) in enumerate(chosen):
                if reasons[i] is not None:
                    continue
                if not math.isfinite(logprob):
                    raise UsageError(f"prompt {places[i]}, new token {len(logprobs[i]) + 1}: {self._not_finite()}")
                if token == self.tokenizer.end and not sampling.ignore_end:
                    reasons[i], shown = "end", streams[i].rest()
                else:
                    logprobs[i].append(logprob)
                    shown = streams[i].add(token)
                    if streams[i].stopped:
                        reasons[i] = "stop"
                    elif len(streams[i].tokens) == sampling.max_tokens:
                        reasons[i], shown = "length", shown + streams[i].rest()
                if shown:
                    show(places[i], shown)
            if None not in reasons:
                break
            if decoder is None:
                decoder = Decoder(model, cache, sampling.max_tokens, self._graph)
                afterwards.callback(decoder.close)
            logits = decoder.step([token for token, _ in chosen], [reason is None for reason in reasons])
        self.measured.prompt_s += first - started
        self.measured.new_s += time.perf_counter() - first
        self.measured.new_tokens += sum(len(stream.tokens) - 1 for stream in streams if stream.tokens)
        self.measured.cache_bytes = max(self.measured.cache_bytes, cache.bytes)
        return [
            Completion(stream.text, stream.tokens, logprob, cast(StopReason, reason))
            for stream, logprob, reason in zip(streams, logprobs, reasons, strict=True)
        ]

    def _chosen(
        self, logits: Tensor | None, sampling: Sampling, draws: list[torch.Generator], count: int
    ) -> list[tuple[int, float]]:
        """The next token of each sequence and its log probability, the same on all ranks of the replica."""
        found = torch.zeros(count, 2, dtype=torch.float64, device=self._model.device)
        if logits is not None:
            wide = logits.double()
            total = wide.logsumexp(-1, keepdim=True)
            # Nothing can be drawn by logits that are not finite; their log probability is NaN all the same.
            drawable = torch.where(total.isfinite(), logits, torch.zeros_like(logits))
            tokens = choose(drawable[:, : self.tokenizer.size], sampling, draws)  # the rest pads the vocabulary
            found[:, 0] = tokens
            found[:, 1] = (wide.gather(-1, tokens[:, None]) - total)[:, 0]
        return [(int(token), logprob) for token, logprob in self._model.broadcast(found).tolist()]

    def _one_sequence(self, cache: Cache) -> int:
        """Tokens of the only sequence of `cache`."""
        if len(cache.lengths) != 1:
            raise UsageError(f"after: a cache of {len(cache.lengths)} sequences; fill one of a single text")
        return cache.lengths[0]

    def _check(self, what: str, tokens: Tokens, cached: int, new: int) -> None:
        check_tokens(what, tokens, cached, new, self.tokenizer, self.run)

    def _not_finite(self) -> str:
        return (
            f"the model's logits are not finite (NaN or Inf): weights of the checkpoint are not, or they overflow in "
            f"{self.run.training.precision}; choose another step, or training.precision=fp32"
        )

"""A run's checkpoint under lm-evaluation-harness (`pip install 'megatron-attn2d[eval]'`), on the ranks that it needs.

    torchrun --nproc-per-node 4 -m megatron_attn2d.inference.lm_eval run --model megatron_attn2d \\
        --model_args run_dir=runs/mine,context_parallel.size=4 --tasks hellaswag

This is the harness's own command line, to which one model is added. Every rank runs it and hands the generator the
same requests; the harness prints and writes on the first rank of each node. What else ranks print is in RUN_DIR/logs.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval.api.model import LM

from megatron_attn2d.errors import UsageError
from megatron_attn2d.inference.sampling import Sampling

if TYPE_CHECKING:  # it imports torch and Megatron, which `--help` should not wait for
    from megatron_attn2d.inference.generator import Generator

NAME = "megatron_attn2d"
"""As `--model` takes it."""
_SHARED_FROM = 256
"""Tokens of a context from which on it is cached once for all its continuations, in place of computing them at once."""
_MAX_TOKENS = 256
"""Of a generated text whose task names no number; the harness's own default."""
_NUMBERS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""How tasks spell that number; of several the first counts, as in the harness."""
_opened: list[MegatronLM] = []


class MegatronLM(LM):
    """A `Generator` as the harness's tasks use a model."""

    def __init__(
        self,
        run_dir: str,
        step: int | None = None,
        batch_size: int | str = 8,
        chunk: int = 4096,
        max_batch_size: int | None = None,
        device: str | None = None,
        **overrides: Any,
    ) -> None:
        """Loads the run's model in this rank; what `--model_args` and the harness's own options say arrives here.

        Args:
            run_dir: the run's directory.
            step: of the checkpoint; None: the last complete one.
            batch_size: requests that are computed at once; the harness hands over its --batch_size, 1 by default.
            chunk: tokens that a rank computes at once.
            max_batch_size: only for the automatic batch size, which there is not.
            device: not read: the harness names one in every call, and the run's configuration has environment.device.
            overrides: keys of the run's configuration, `context_parallel.size=4`.

        Raises:
            UsageError: there is no such checkpoint, or an option does not fit it.
        """
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise UsageError(f"batch_size {batch_size}: choose a number, 1 or more")
        if max_batch_size is not None:
            raise UsageError(f"max_batch_size {max_batch_size}: there is no automatic batch size; give batch_size")
        from megatron_attn2d.inference.generator import Generator

        words = [f"{key}={value}" for key, value in overrides.items()]
        self._use(Generator.load(Path(run_dir), words, step=step, batch=int(batch_size), chunk=chunk))
        # The console is the harness's, whose table would else go to the rank's log.
        self._stdout, sys.stdout = sys.stdout, self.generator.console
        _opened.append(self)

    def _use(self, generator: Generator) -> None:
        super().__init__()
        self.generator = generator
        self._begin = generator.tokenizer.encode("") or [generator.tokenizer.end]
        """What stands before a text that nothing stands before."""

    def close(self) -> None:
        """Ends Megatron in this rank, and gives the console back."""
        sys.stdout = self._stdout
        self.generator.close()

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Of each request (context, continuation): the log probability, and whether greedy choice would give it."""
        pairs = [self._pair(*request.args) for request in requests]
        places = defaultdict(list)  # of requests that share a context
        for place, (context, _) in enumerate(pairs):
            places[tuple(context)].append(place)
        found: dict[int, tuple[float, bool]] = {}
        single: list[int] = []
        for shared, of_context in places.items():
            if len(of_context) == 1 or len(shared) < _SHARED_FROM:
                single += of_context
                continue
            continuations = [pairs[place][1] for place in of_context]
            cache = self.generator.prefill([list(shared)], room=max(map(len, continuations)))
            scores = self.generator.log_likelihood([[]] * len(continuations), continuations, after=cache)
            found |= zip(of_context, scores, strict=True)
        single.sort(key=lambda place: len(pairs[place][0]) + len(pairs[place][1]))  # batches of like length
        if single:
            scores = self.generator.log_likelihood(*zip(*(pairs[place] for place in single), strict=True))
            found |= zip(single, scores, strict=True)
        for place, request in enumerate(requests):
            self.cache_hook.add_partial("loglikelihood", request.args, found[place])
        return [found[place] for place in range(len(requests))]

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of both, as they stand one after the other in a text."""
        encode = self.generator.tokenizer.encode
        bare = context.rstrip()
        context, continuation = bare, context[len(bare) :] + continuation  # a token may begin with its space
        before = encode(context) if context else self._begin
        both = encode(context + continuation)
        if not context and both[: len(before)] != before:
            both = [*before, *both]
        return before, both[len(before) :]

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """The log probability of each text, in windows as long as the model has positions."""
        found = []
        for request in requests:
            (text,) = request.args
            tokens = self.generator.tokenizer.encode(text)
            if tokens[: len(self._begin)] == self._begin:
                tokens = tokens[len(self._begin) :]
            contexts, continuations = windows(tokens, self._begin[-1], self.generator.positions or len(tokens) + 1)
            scores = self.generator.log_likelihood(contexts, continuations)
            found.append(sum(logprob for logprob, _ in scores))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, found[-1])
        return found

    def generate_until(self, requests: list[Any]) -> list[str]:
        """What follows each request (context, options), up to the first of the options' `until`."""
        places = defaultdict(list)  # of requests with equal options
        for place, request in enumerate(requests):
            places[sampling(request.args[1])].append(place)
        found: dict[int, str] = {}
        for options, alike in places.items():
            prompts = [self.generator.tokenizer.encode(requests[place].args[0]) or self._begin for place in alike]
            completions = self.generator.generate(prompts, options)
            found |= zip(alike, (completion.text for completion in completions), strict=True)
        for place, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, found[place])
        return [found[place] for place in range(len(requests))]


def windows(tokens: list[int], begin: int, longest: int) -> tuple[list[list[int]], list[list[int]]]:
    """`tokens` as continuations that are scored once each, and before each as much of the text as fits `longest`.

    Before the first stands the token `begin`. All but the last are as long as can be, as the harness wants it.
    """
    text, contexts, continuations = [begin, *tokens], [], []
    for first in range(1, len(text), longest - 1):
        continuation = text[first : first + longest - 1]
        contexts.append(text[max(0, first + len(continuation) - longest) : first])
        continuations.append(continuation)
    return contexts, continuations


def sampling(options: dict[str, Any]) -> Sampling:
    """A task's `generation_kwargs` as ours.

    Raises:
        UsageError: there is one that changes what is generated and is not served.
    """
    options = dict(options)
    until = options.pop("until", None) or []
    samples, temperature = options.pop("do_sample", None), options.pop("temperature", None)
    if samples is None:  # as in the harness a temperature alone asks for it
        samples = bool(temperature)
    numbers = [options.pop(name) for name in _NUMBERS if name in options]
    chosen = Sampling(
        max_tokens=int(numbers[0] if numbers else _MAX_TOKENS),
        temperature=0.0 if not samples else 1.0 if temperature is None else float(temperature),
        top_p=float(options.pop("top_p", 1.0)),
        top_k=int(options.pop("top_k", 0)),
        seed=int(options.pop("seed", 0)),
        stop=(until,) if isinstance(until, str) else tuple(until),
    )
    if options:
        raise UsageError(
            f"generation option {next(iter(options))}: not served; served are until, max_gen_toks, do_sample, "
            "temperature, top_p, top_k and seed"
        )
    return chosen


def main(words: Sequence[str] | None = None) -> int:
    """Runs the harness's command line with `--model megatron_attn2d` known to it; the exit code."""
    import lm_eval.models  # noqa: F401  # registers its own models where none is registered yet
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import model_registry

    model_registry.register(NAME, target=MegatronLM)
    if words is not None:
        sys.argv[1:] = list(words)
    try:
        cli_evaluate()
    except UsageError as error:
        print(f"lm_eval: {error}", file=sys.stderr)
        return 2
    finally:
        for model in _opened:
            model.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())

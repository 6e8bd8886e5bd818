#!/usr/bin/env python3
"""Train a tiny GPT with CUDA graphs and without, and compare every step bit by bit.

    python benchmarks/check_cuda_graphs.py --ranks 2 --quick
    python benchmarks/check_cuda_graphs.py --ranks 4 --only pipeline
    python benchmarks/check_cuda_graphs.py --ranks 2 --nodes --jobs 3 --timeout 150 --only 1x2 micro-batches
    python benchmarks/check_cuda_graphs.py --ranks 1 --only documents --lines 45

Each row is a run of `megatron-attn2d train` on all ranks, in deterministic mode. Its losses and gradient norms must be
those of the same run without graphs, and it must end by itself: also after SIGTERM, and where it continues from a
checkpoint. Several runs share the GPUs, as starting takes longer than training. A row is printed once known. Exits
with 1 where a row failed. With --nodes each rank poses as a host, so that the ranks of a run may share GPUs too.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

from training_run import ROOT, TrainingError, machines, run, started
from watched import brief

from megatron_attn2d.data import docstrings
from megatron_attn2d.data.build import build
from megatron_attn2d.data.tokenizers import TokenizerChoice
from megatron_attn2d.errors import UsageError
from megatron_attn2d.run.metrics import read_steps

YAML = ROOT / "benchmarks/benchmark_training.yaml"
TINY = [
    *("model.num_layers=4", "model.hidden_size=512", "model.num_attention_heads=8", "data.vocab_size=1024"),
    *("data.null_tokenizer_eod_id=1023", "training.seq_length=2048", "training.train_iters=8"),
    *("megatron_args.deterministic_mode=true", "megatron_args.cross_entropy_loss_fusion=null"),
]
if find_spec(
    "transformer_engine"
):  # graphs need its random numbers: the runs that they are compared with take them too
    TINY += ["megatron_args.te_rng_tracker=true"]
BY_TE = "megatron_args.cuda_graph_impl=transformer_engine"
GRAPHS = {
    "layer": ["training.cuda_graphs=layer"],
    "layer, by Transformer Engine": ["training.cuda_graphs=layer", BY_TE],
    "attention": ["training.cuda_graphs=attention"],
    "iteration": ["training.cuda_graphs=iteration"],
}
SELECTIVE = ["training.recompute_granularity=selective"]
FULL = ["training.recompute_granularity=full", "training.recompute_method=uniform", "training.recompute_num_layers=1"]
SEVERAL = ["training.global_batch_size=4"]  # micro-batches of one sequence
BYTES = ["data.mock=false", "data.vocab_size=512", "data.null_tokenizer_eod_id=256"]
BINS = "data.document_bins=96"
"""More than any sample of texts or examples needs. The run without graphs has them too, so that kernels get the same
tables."""
SHORTEST, TEXTS = 32, 2000
"""Bytes of a text at least, so that no sample needs more bins; and how many texts there are."""

type Steps = list[dict[str, Any]]
type Row = tuple[str, list[str], str, list[str]]
"""What is compared, its overrides, the graphs, and overrides of the run with graphs alone."""


def grid(*axes: int) -> list[str]:
    """Overrides for attention2d on this grid."""
    return [f"context_parallel.grid={list(axes)}"]


def short_texts(directory: str | Path) -> Path:
    """A data set of texts of 32 to 511 bytes, docstrings with their functions, each a document; its prefix."""
    prefix, lines = Path(directory) / "short-texts", Path(directory) / "short-texts.jsonl"
    texts = (example["prompt"] + example["completion"] for example in docstrings.examples())
    fitting = (text for text in texts if SHORTEST <= len(text.encode()) < docstrings.LONGEST)
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in islice(fitting, TEXTS)))
    build([lines], prefix, TokenizerChoice())
    return prefix


def documents(texts: str, *others: str) -> list[str]:
    """Overrides for packs of the texts of that prefix, each of them a sequence of its own."""
    return [*BYTES, f"data.paths=[{texts}]", "data.document_masking=true", *others]


def rows_of_documents(ranks: int, texts: str, examples: str) -> list[Row]:
    """What is compared on packs, whose documents are others in each step: of two data sets, by their prefixes."""
    own = grid(ranks, 1) if ranks > 1 else []
    packs, impl = documents(texts, *own, BINS), ("layer", "attention", "iteration")
    found: list[Row] = [("documents", packs, graphs, []) for graphs in GRAPHS]
    found += [("documents, 4 micro-batches", [*packs, *SEVERAL], graphs, []) for graphs in impl]
    two = [*packs, "training.micro_batch_size=2", "training.global_batch_size=2"]
    found += [("documents, micro-batch of 2", two, graphs, []) for graphs in impl]
    sft = [*BYTES, f"data.paths=[{examples}]", "data.format=sft", *own, BINS]
    found += [("documents of fine-tuning", sft, graphs, []) for graphs in impl]
    found += [("documents", packs, "layer", SELECTIVE), ("documents", packs, "iteration", FULL)]
    evaluated = [*packs, "data.split='95,5,0'", "training.eval_iters=2", "training.eval_interval=4"]
    found += [("documents, evaluated", evaluated, graphs, []) for graphs in ("layer", "iteration")]
    if ranks > 1:
        for name, mode in (
            ("1xN", grid(1, ranks)),
            ("Nx1x1", grid(ranks, 1, 1)),
            ("ring", ["context_parallel.mode=ring"]),
        ):
            found += [(f"documents, {name}", documents(texts, *mode, BINS), graphs, []) for graphs in impl]
    if ranks == 4:
        stages = documents(texts, "parallelism.pipeline=2", "context_parallel.size=2", *grid(2, 1), *SEVERAL, BINS)
        found += [("documents, pipeline of 2, 2x1", stages, graphs, []) for graphs in GRAPHS]
        interleaved = [*stages, "parallelism.virtual_pipeline=2"]
        found += [("documents, interleaved pipeline of 2, 2x1", interleaved, graphs, []) for graphs in impl]
        tensor = ["parallelism.tensor=2", "parallelism.sequence_parallel=true", "context_parallel.size=2", *grid(2, 1)]
        found += [("documents, tensor 2, 2x1", documents(texts, *tensor, BINS), graphs, []) for graphs in impl]
    return found


def rows(ranks: int, quick: bool) -> list[Row]:
    """All that is compared on these ranks of one sequence per sample, what matters most first."""
    if ranks == 1:
        return []
    main = f"attention2d {ranks}x1", grid(ranks, 1)
    found: list[Row] = [(*main, graphs, []) for graphs in ("layer", "attention", "iteration")]
    if quick:
        return [*found, ("ring", ["context_parallel.mode=ring"], "layer", [])]
    found += [(*main, "layer, by Transformer Engine", [])]
    others = [(f"attention2d 1x{ranks}", grid(1, ranks)), (f"attention2d {ranks}x1x1", grid(ranks, 1, 1))]
    if ranks == 4:
        others += [("attention2d 2x2", grid(2, 2)), ("attention2d 2x2x1", grid(2, 2, 1))]
        others += [("attention2d 2x2, tile 1x2", [*grid(2, 2), "context_parallel.tile=[1, 2]"])]
    found += [(*other, graphs, []) for other in others for graphs in ("layer", "iteration")]
    found += [("ring", ["context_parallel.mode=ring"], graphs, []) for graphs in ("layer", "iteration")]
    found += [(*main, "layer", SELECTIVE), (*main, "iteration", FULL)]
    several = f"{main[0]}, 4 micro-batches", [*main[1], *SEVERAL]
    found += [(*several, graphs, []) for graphs in ("layer", "attention", "iteration")]
    if ranks == 4:
        stages = ["parallelism.pipeline=2", "context_parallel.size=2", *grid(2, 1), *SEVERAL]
        found += [("pipeline of 2, 2x1", stages, graphs, []) for graphs in GRAPHS]
        interleaved = [*stages, "parallelism.virtual_pipeline=2"]
        found += [("interleaved pipeline of 2, 2x1", interleaved, graphs, []) for graphs in GRAPHS]
        tensor = ["parallelism.tensor=2", "parallelism.sequence_parallel=true", "context_parallel.size=2", *grid(2, 1)]
        found += [("tensor 2, sequence parallel, 2x1", tensor, graphs, []) for graphs in ("layer", "iteration")]
    return found


def main() -> None:
    """Run everything, print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, choices=[1, 2, 4], help="one GPU each; 1: documents alone")
    parser.add_argument("--nodes", action="store_true", help="each rank poses as a host; they may share GPUs")
    parser.add_argument("--quick", action="store_true", help="the rows that matter most")
    parser.add_argument("--only", nargs="+", default=[""], help="rows whose name holds one of these")
    parser.add_argument("--lines", type=int, default=15, help="of what a failed run printed")
    parser.add_argument("--jobs", type=int, default=6, help="runs at once")
    parser.add_argument("--timeout", type=float, default=90, help="seconds for a run")
    parser.add_argument("--budget", type=float, default=600, help="seconds for all of it; runs end with it")
    args = parser.parse_args()
    failed, begin = 0, time.monotonic()
    args.end = begin + args.budget
    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(args.jobs) as executor:
        args.texts, args.examples = str(short_texts(directory)), str(docstrings.build_default(directory))
        labels = {executor.submit(check): label for label, check in checks(args, executor).items()}
        for future in as_completed(labels):
            try:
                verdict = f"ok      {future.result()}"
            except (TrainingError, UsageError, AssertionError) as error:
                failed, verdict = failed + 1, f"FAILED  {brief(str(error), args.lines)}"
            print(f"{time.monotonic() - begin:4.0f} s  {labels[future]:58s} {verdict}", flush=True)
    print(f"{len(labels) - failed} of {len(labels)} as they should be")
    sys.exit(failed > 0)


def checks(args: argparse.Namespace, executor: ThreadPoolExecutor) -> dict[str, Callable[[], str]]:
    """What is to be checked; the runs without graphs are on their way already."""
    found: dict[str, Callable[[], str]] = {}
    plain: dict[str, Future[Steps]] = {}
    compared = rows(args.ranks, args.quick)
    if not args.quick:
        compared += rows_of_documents(args.ranks, args.texts, args.examples)
    for name, overrides, graphs, more in compared:
        label = ", ".join([f"{name}: {graphs}", *("recomputed" for _ in more[:1])])
        if wanted(args, label):
            if name not in plain:
                plain[name] = executor.submit(train, args, overrides)
            found[label] = partial(compare, args, [*overrides, *GRAPHS[graphs], *more], plain[name])
    if not args.quick:
        own = grid(args.ranks, 1) if args.ranks > 1 else []
        packs = documents(args.texts, *own)
        near = {"documents in bins, no graphs": [BINS]}
        near |= {f"documents in as many bins as they need: {one}": GRAPHS[one] for one in ("layer", "iteration")}
        for label, more in near.items():
            if wanted(args, label):
                found[label] = partial(alike, args, [*packs, *more], packs)
    if args.ranks == 1:
        return found
    steps = 20 if args.quick else 200
    for graphs in ("layer",) if args.quick else ("layer", "attention", "iteration"):
        others = {
            f"{steps} steps, stopped and resumed: {graphs}": partial(resumed, args, GRAPHS[graphs], steps),
            f"SIGTERM: {graphs}": partial(terminated, args, GRAPHS[graphs]),
            f"dropout: {graphs}": partial(dropout, args, GRAPHS[graphs]),
        }
        found |= {label: check for label, check in others.items() if wanted(args, label)}
    return found


def wanted(args: argparse.Namespace, label: str) -> bool:
    """Whether a row is asked for."""
    return any(part in label for part in args.only)


def train(args: argparse.Namespace, overrides: list[str], directory: str | None = None) -> Steps:
    """The recorded steps of a run that ended by itself."""
    with tempfile.TemporaryDirectory() as cache:  # runs that begin at once would write the same one
        overrides = [*tiny(args), f"data.data_cache_path={cache}", *overrides]
        return run(YAML, args.ranks, overrides, _limit(args), torchrun=False, nodes=args.nodes, directory=directory)


def _limit(args: argparse.Namespace) -> float:
    """Seconds that a run which begins now may take."""
    return max(0.1, min(args.timeout, args.end - time.monotonic()))


def tiny(args: argparse.Namespace) -> list[str]:
    """Overrides for the tiny model on all ranks."""
    return [*TINY, f"context_parallel.size={args.ranks}", *machines(args.ranks, args.nodes)]


def compare(args: argparse.Namespace, overrides: list[str], expected: Future[Steps]) -> str:
    """Says that a run took the same steps as one without graphs."""
    found = train(args, overrides)
    try:
        return same(found, expected.result())
    except TrainingError as error:
        raise TrainingError(f"the run without graphs: {error}") from None


def same(found: Steps, expected: Steps) -> str:
    """Says that two runs took the same steps; raises AssertionError with the first difference."""
    assert len(found) == len(expected), f"{len(found)} steps instead of {len(expected)}"
    for one, other in zip(found, expected, strict=True):
        for name in ("loss", "grad_norm"):
            assert one[name] == other[name], (
                f"{name} of step {one['step']} is {one[name]}, without graphs {other[name]}"
            )
    return f"{len(found)} steps, bit by bit"


def alike(args: argparse.Namespace, overrides: list[str], others: list[str]) -> str:
    """Says how far losses are from those of the same run on documents as they come, whose kernels get other tables."""
    with ThreadPoolExecutor(2) as both:
        found, expected = both.map(partial(train, args), (overrides, others))
    apart = max(abs(a["loss"] - b["loss"]) / b["loss"] for a, b in zip(found, expected, strict=True))
    assert apart < 5e-3, f"losses in bins are {apart:.1e} from those of documents as they come"
    return f"losses {apart:.1e} apart"


def dropout(args: argparse.Namespace, graphs: list[str]) -> str:
    """Says how far losses with dropout are from those without graphs, whose random numbers are others."""
    overrides = [*grid(args.ranks, 1), "model.attention_dropout=0.3", "training.train_iters=12", "optimizer.lr=1e-30"]
    with ThreadPoolExecutor(2) as both:
        runs = [both.submit(train, args, [*overrides, *more]) for more in (graphs, [])]
        losses = [[step["loss"] for step in one.result()] for one in runs]
    apart = max(abs(a - b) / b for a, b in zip(*losses, strict=True))
    assert apart < 5e-2, f"losses with dropout are {apart:.1e} apart"
    return f"losses {apart:.1e} apart"


def resumed(args: argparse.Namespace, graphs: list[str], steps: int) -> str:
    """Says that a run that stopped in the middle went on as one that did not."""
    half = steps // 2
    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(1) as beside:
        kept = [*grid(args.ranks, 1), *graphs, f"training.train_iters={steps}", "checkpoint.save=true"]
        whole = beside.submit(train, args, kept, f"{directory}/whole")
        train(args, [*kept, f"training.exit_interval={half}"], f"{directory}/split")
        found = train(args, kept, f"{directory}/split")
        return same(found[-half:], whole.result()[-half:])


def terminated(args: argparse.Namespace, graphs: list[str]) -> str:
    """Says how long a run took to end after SIGTERM."""
    overrides = [*tiny(args), *grid(args.ranks, 1), *graphs, "training.train_iters=20000"]
    with (
        tempfile.TemporaryDirectory() as directory,
        started(YAML, args.ranks, overrides, Path(directory), nodes=args.nodes) as training,
    ):
        deadline, code = time.monotonic() + _limit(args), None
        while code is None and time.monotonic() < deadline and len(_steps(directory)) < 10:
            code = training.wait(0.2)
        steps = len(_steps(directory))
        assert code is None, f"exit code {code} after {steps} steps\n{training.printed()}"
        assert steps >= 10, f"only {steps} steps in time\n{training.printed()}"
        begin = time.monotonic()
        for process in training.processes:
            process.send_signal(signal.SIGTERM)
        code = training.wait(60)
        assert code is not None, "still there a minute after SIGTERM"
        assert code == 0, f"exit code {code} after SIGTERM\n{training.printed()}"
        return f"ended in {time.monotonic() - begin:.1f} s"


def _steps(directory: str) -> dict[int, dict[str, Any]]:
    with suppress(UsageError):
        return read_steps(Path(directory))
    return {}


if __name__ == "__main__":
    main()

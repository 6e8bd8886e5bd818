#!/usr/bin/env python3
"""Time the decode step of a model with random weights at long contexts, beside what the memory's bandwidth allows.

    python benchmarks/benchmark_decode.py --ranks 4                         # 8 B parameters, 64K, 256K and 1M tokens
    python benchmarks/benchmark_decode.py --ranks 8 --faked                 # one GPU plays one of eight ranks
    python benchmarks/benchmark_decode.py --device cpu --model configs/models/gpt_tiny_bytes.yaml --tokens 256 1024

All ranks are context ranks unless --tensor says otherwise. The cache is made up, as nobody waits for a prefill of a
million tokens; it is read like any other. Columns, of the slowest rank:

    cache        keys and values on each rank
    attention    all layers' attention to this rank's cache, in one CUDA graph; its bound: the bytes of the cache over
                 the bandwidth that the memory reached when it copied a large tensor
    step         one more token of each sequence: the model, messages between ranks, choice of the token; its bound: the
                 bytes of the cache and of the weights over the bandwidth; plain: the step without a CUDA graph
    peak         the most memory that tensors took on a rank; plan: the cache over the context ranks, and the weights

Before that, a decoded token is compared with the same token filled in as part of a prompt; a difference ends the
program with exit code 1. With --faked one process is rank 0, and the others are faked (`faked_world`): logits are wrong
and not compared, and messages take no time on a wire, so that a step shows what a rank computes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from decode_table import heading, line
from faked_world import as_first_rank

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_attn2d.config import load_run, resolved_yaml
from megatron_attn2d.inference import configuration, shards
from megatron_attn2d.launch import environment, ranks

ROOT = Path(__file__).resolve().parents[1]
PROMPT = 600
WARM_UP = 3
_TOLERANCE = 0.1
"""For bf16, relative to the largest logit: 32 layers of random weights differed by 0.06 on H200."""


def main() -> int:
    """Start the ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--faked", action="store_true", help="be rank 0 of --ranks, on one GPU, and fake the others")
    parser.add_argument("--tensor", type=int, default=1, help="of the ranks, how many share a token's weights")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1 << 16, 1 << 18, 1 << 20], help="in the cache")
    parser.add_argument("--batch", type=int, default=1, help="sequences")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--model", type=Path, default=ROOT / "configs/models/llama_8b.yaml")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--prefill", type=int, default=0, help="also time a prompt of so many tokens")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("overrides", nargs="*", help="key=value of the run, such as model.num_layers=8")
    args = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as folder:
        run = configuration.configuration(described(Path(folder), args), [])
        environment.apply_variables(args.device, run.environment.variables)
        environment.check_devices(args.device, 1 if args.faked else args.ranks)
        arguments = configuration.arguments(run, None)
        if not args.faked:
            return ranks.run_local(args.ranks, partial(run_rank, args), arguments, device=args.device)
        as_first_rank(lambda _, args: run_rank(args, arguments), args)
        return 0


def described(folder: Path, args: argparse.Namespace) -> Path:
    """A run's directory that holds its configuration alone."""
    cluster = ROOT / "configs/clusters" / ("cpu.yaml" if args.device == "cpu" else "gpu.yaml")
    (folder / "run.yaml").write_text(f"extends: [{args.model.resolve()}, {cluster}]\n")
    context = args.ranks // args.tensor
    overrides = [
        *("training.seq_length=4096", "training.global_batch_size=1", "training.train_iters=1", "optimizer.lr=1e-4"),
        *(f"parallelism.tensor={args.tensor}", f"context_parallel.size={context}", f"run.dir={folder}"),
        "data.mock=true",
        *(["environment.gpus_per_node=null"] if args.device == "cuda" else []),
    ]
    run = load_run(folder / "run.yaml", [*overrides, *args.overrides])
    (folder / "config.yaml").write_text(resolved_yaml(run))
    return folder


def run_rank(args: argparse.Namespace, arguments: list[str]) -> None:
    """All cases on one rank; rank 0 prints."""
    from megatron_attn2d.training import session

    with session.in_megatron(arguments) as console:
        from megatron_attn2d.inference.model import Model

        model = Model.built()
        try:
            _measure(args, model, partial(print, file=console, flush=True))
        finally:
            model.close()


def _measure(args: argparse.Namespace, model: Any, write: Callable[[str], None]) -> None:
    first = dist.get_rank() == 0
    difference = 0.0 if args.faked else check(model)
    weights = model.weight_bytes
    bandwidth = _bandwidth(model.device)
    if first:
        write(
            f"{args.model.stem}: {args.ranks // args.tensor} context x {args.tensor} tensor ranks, "
            f"{args.batch} sequences, weights {weights / 2**30:.2f} GiB per rank, memory {bandwidth / 1e9:,.0f} GB/s; "
            + (
                f"rank 0, the other {args.ranks - 1} faked, without the time of messages"
                if args.faked
                else f"decoded and filled-in logits differ by {difference:.1e} of the largest"
            )
        )
    if difference > (_TOLERANCE if args.device == "cuda" else 1e-4):
        raise RuntimeError(f"a decoded token's logits differ by {difference:.1e} of the largest: too much")
    if args.prefill:
        seconds = prefill(model, args.prefill)
        if first:
            write(f"a prompt of {args.prefill:,} tokens in {seconds:.2f} s, {args.prefill / seconds:,.0f} tokens/s")
    if first:
        write(heading())
    rows = []
    for tokens in args.tokens:
        rows.append(measure(model, tokens, args, weights, bandwidth))
        if first:
            write(line(rows[-1]))
    if args.json and first:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


def measure(model: Any, tokens: int, args: argparse.Namespace, weights: int, bandwidth: float) -> dict[str, float]:
    """One row."""
    from megatron_attn2d.inference.decode import Decoder

    context = args.ranks // args.tensor
    steps = 2 * args.steps + 4 * WARM_UP
    capacity = -(-(tokens + steps) // context)
    needed = args.batch * capacity * model.bytes_per_token
    if needed > 0.95 * model.free_bytes():
        return {"tokens": tokens, "needs_gib": needed / 2**30}
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    cache = model.new_cache(args.batch, capacity)
    made_up(model, cache, tokens)
    attention = _slowest(_attention_ms(model, cache), model.device)
    before = cache.snapshot()
    plain = Decoder(model, cache, steps, "never")
    times = _step_times(plain, cache, args.steps if model.device.type == "cpu" else max(3, args.steps // 3))
    row = {"plain_ms": _slowest(statistics.median(times), model.device)}
    if model.graph_refusal is None:
        cache.roll_back(before)
        decoder = Decoder(model, cache, steps, "always")
        times = _step_times(decoder, cache, args.steps)
        decoder.close()
    step = _slowest(statistics.median(times), model.device)
    peak = torch.cuda.max_memory_allocated() if model.device.type == "cuda" else 0
    held = args.batch * tokens / context * model.bytes_per_token
    bounds = held / bandwidth * 1e3, (held + weights) / bandwidth * 1e3
    return row | {
        "tokens": tokens,
        "cache_gib": held / 2**30,
        "attention_ms": attention,
        "attention_bound_ms": bounds[0],
        "attention_ratio": attention / bounds[0],
        "step_ms": step,
        "step_bound_ms": bounds[1],
        "step_ratio": step / bounds[1],
        "tokens_per_s": args.batch * 1e3 / step,
        "plan_gib": (needed + weights) / 2**30,
        "peak_gib": _slowest(peak / 2**30, model.device),
    }


def made_up(model: Any, cache: Any, tokens: int) -> None:
    """Fills the cache with noise, as if so many tokens of each sequence had been filled in."""
    ranks_ = cache.ranks
    share = [tokens // ranks_ + (rank < tokens % ranks_) for rank in range(ranks_)]
    kept = share[cache.rank]
    cache.positions[:, :kept] = torch.arange(kept, device=cache.positions.device) * ranks_ + cache.rank
    for layer in model.layers:
        cache.layer(layer)
        for x in cache.layers[layer.layer_number]:
            x.normal_()
    cache.filled = [list(share) for _ in cache.filled]


def _step_times(decoder: Any, cache: Any, steps: int) -> list[float]:
    """Milliseconds of each step, the choice of the next token among them."""
    count = len(cache.lengths)
    chosen, active, times = [1] * count, [True] * count, []
    for i in range(WARM_UP + steps):
        begin = time.perf_counter()
        logits = decoder.step(chosen, active)
        chosen = logits.argmax(-1).tolist()
        if i >= WARM_UP:
            times.append((time.perf_counter() - begin) * 1e3)
    return times


def _attention_ms(model: Any, cache: Any) -> float:
    """Milliseconds of all layers' attention to this rank's shard, without messages."""
    from megatron_attn2d.inference.passes import Decode

    active = torch.ones(len(cache.lengths), dtype=torch.bool, device=model.device)
    step = Decode(cache, active)
    queries = {
        layer: torch.randn(
            len(cache.lengths),
            layer.config.num_attention_heads // layer.config.tensor_model_parallel_size,
            cache.layer(layer)[0].size(-1),
            device=model.device,
            dtype=layer.config.params_dtype,
        )
        for layer in model.layers
    }

    def attend() -> None:
        for layer, q in queries.items():
            step.attend_shard(q, *cache.layer(layer), 0.1, None)

    return _timed_ms(attend, model.device)


def _timed_ms(call: Callable[[], None], device: torch.device, repeats: int = 10) -> float:
    """Milliseconds per call; on a GPU of the replays of a CUDA graph."""
    call()
    if device.type != "cuda":
        begin = time.perf_counter()
        call()
        return (time.perf_counter() - begin) * 1e3
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    graph.replay()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        graph.replay()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / repeats


def _bandwidth(device: torch.device) -> float:
    """Bytes per second that the slowest rank's memory reached when it copied a tensor: read and written ones."""
    source = torch.ones((1 << 30) if device.type == "cuda" else (1 << 24), dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)

    seconds = _timed_ms(copy, device) / 1e3
    return 2 * source.numel() * source.element_size() / _slowest(seconds, device)


def _slowest(value: float, device: torch.device) -> float:
    """The largest `value` of all ranks."""
    x = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(x, dist.ReduceOp.MAX)
    return float(x)


def _filled(model: Any, tokens: list[int], chunk: int) -> Any:
    """A cache of one sequence, and the logits of its last token in it."""
    from megatron_attn2d.inference.fill import fill

    context = 1 if model.context_group is None else model.context_group.size()
    capacity = shards.capacity([len(tokens)], 1, chunk * context, context)
    cache = model.new_cache(1, capacity)
    fill(model, cache, [tokens], chunk)
    return cache


def check(model: Any) -> float:
    """The largest difference of a decoded token's logits from those of the same token in a prompt, relative."""
    from megatron_attn2d.inference.decode import Decoder

    torch.manual_seed(0)
    tokens = torch.randint(200, (PROMPT,)).tolist()
    whole = _filled(model, tokens, 1 << 20).logits  # one chunk: attention2d alone
    cache = _filled(model, tokens[:-1], 64)  # several
    graph = "always" if model.graph_refusal is None else "never"
    decoder = Decoder(model, cache, 1, graph)
    found = decoder.step(tokens[-1:], [True])
    difference = float((found - whole).abs().max() / whole.abs().max())
    decoder.close()
    return _slowest(difference, model.device)


def prefill(model: Any, tokens: int) -> float:
    """Seconds of a prompt."""
    _filled(model, [1] * min(tokens, 8192), 4096)
    begin = time.perf_counter()
    logits = _filled(model, [1] * tokens, 4096).logits
    logits.sum().item()
    return _slowest(time.perf_counter() - begin, model.device)


if __name__ == "__main__":
    sys.exit(main())
